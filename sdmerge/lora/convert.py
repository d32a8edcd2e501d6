"""Convert an adapter into another layout: names, and factors only where the layout needs it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sdformats.adapters import open_adapter
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layouts import LAYOUTS
from sdformats.adapters.names import kernel_of
from sdformats.adapters.reading import check_holds, listed, needs_of
from sdformats.files import open_source
from sdmerge.errors import FamilyError, MismatchError, RequestError, nearest
from sdmerge.execute import no_collection
from sdmerge.lora.algebra import as_full, as_lora
from sdmerge.lora.places import Places
from sdmerge.lora.refs import fold, in_type
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.layout import AdapterLayout, Written
    from sdformats.adapters.record import Record
    from sdformats.tensor import TensorSource
    from sdmerge.conversion import Conversion
    from sdmerge.execute import Report
    from sdmerge.options import Options
    from sdmerge.step import Plan

_BY_FAMILY = {"sdxl": "kohya-sgm", "sdxl-refiner": "kohya-sgm", "flux": "flux-kohya", "sd3": "sd3-kohya"}


LAYOUT_NAMES = frozenset(layout.name for layout in LAYOUTS)


def layout_named(name: str) -> AdapterLayout:
    """Return a layout.

    Raises:
        RequestError: there is none of that name.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    if name not in known:
        raise RequestError(f"{name!r} is no layout (`sdmerge layouts` lists them){nearest(name, known)}")
    return known[name]


def layout_for(family: str | None, name: str | None) -> AdapterLayout:
    """Return the layout that is asked for, or sd-scripts' for the family.

    Raises:
        RequestError: there is none of that name.
    """
    return layout_named(name or _BY_FAMILY.get(family or "", "kohya"))


def convert_adapter(
    source: TensorSource, target: Path, conversion: Conversion, options: Options, started: float
) -> Report:
    """Write an open adapter in another layout.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    if conversion.to is None:
        raise RequestError("name the layout to convert the adapter to, with to (--to)")
    layout = layout_named(conversion.to)
    with ExitStack() as stack:
        with no_collection():
            base = stack.enter_context(open_source(conversion.base)) if conversion.base is not None else None
            plan, written = _planned(source, base, layout, conversion, options)
        return write_out(plan, written, target, options, started, "converting")


def _planned(
    opened: TensorSource, base: TensorSource | None, layout: AdapterLayout, conversion: Conversion, options: Options
) -> tuple[Plan, Written]:
    """Decide about every tensor."""
    adapter, before = open_adapter(opened, conversion.adapter_config)
    notes = Notes()
    notes.add(f"{before.name} to {layout.name}")
    notes.take(adapter.notes)
    adapter = replace(adapter, family=options.family or adapter.family)
    adapter = mapped(_formed(adapter, conversion, base), options)
    if conversion.allow_loss:
        adapter = _without_loss(layout, adapter, notes)
    check_holds(layout, adapter, converts=True)
    assert layout.write is not None, "check_holds refuses layouts that are only read"
    written = layout.write(layout, adapter, fold)
    sources = (opened,) if base is None else (opened, base)
    return plan_of(written, sources, adapter.family, notes), written


def mapped(adapter: Adapter, options: Options) -> Adapter:
    """Return an adapter with its tensors in the output's type."""
    change = partial(in_type, dtype=options.output_type)
    modules = {path: record.map(change) for path, record in adapter.modules.items()}
    embeddings = {word: {key: change(ref) for key, ref in inner.items()} for word, inner in adapter.embeddings.items()}
    return replace(adapter, modules=modules, embeddings=embeddings)


def _formed(adapter: Adapter, conversion: Conversion, base: TensorSource | None) -> Adapter:
    """Turn every record into the form asked for."""
    if conversion.form is None:
        return adapter
    places = _places(adapter, base) if base is not None else None
    modules: dict[str, Record] = {}
    for path, record in adapter.modules.items():
        kernel = kernel_of(path, adapter.family)
        weight = places.weight(path) if places is not None else None
        if conversion.form == "lora":
            if weight is not None:
                kernel = (weight.shape[2], weight.shape[3]) if len(weight.shape) == 4 else None
            modules[path] = record if record.algorithm in ("norm", "full") else as_lora(path, record, kernel)
            continue
        shape = weight.shape if weight is not None else _shape(record, kernel)
        modules[path] = as_full(path, record, weight, shape)
    return replace(adapter, modules=modules)


def _places(adapter: Adapter, base: TensorSource) -> Places:
    """Return where the adapter's modules are in the base model.

    Raises:
        FamilyError: the model is of another family.
        MismatchError: it has no place for some modules.
    """
    places = Places(base)
    if adapter.family and places.family and adapter.family != places.family:
        raise FamilyError(f"{base.path}: is {places.family}, and the adapter is for {adapter.family}")
    if missing := [path for path in adapter.modules if places.find(path) is None]:
        raise MismatchError(
            f"{base.path}: has no place for {len(missing):,} of the adapter's {len(adapter.modules):,} modules: "
            f"{listed(missing)} (expected the model that it is for)"
        )
    return places


def _shape(record: Record, kernel: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the weight's shape by its module's kernel, for records that only know the flattened matrix."""
    if kernel is None or record.algorithm not in ("loha", "lokr") or record.height is None or record.columns is None:
        return None
    if any(len(ref.shape) == 4 for _, ref in record.refs):
        return None
    return (record.height, record.columns // (kernel[0] * kernel[1]), *kernel)


def _without_loss(layout: AdapterLayout, adapter: Adapter, notes: Notes) -> Adapter:
    """Leave out what a layout cannot hold, and say so."""
    modules: dict[str, Record] = {}
    for path, record in adapter.modules.items():
        lost = sorted(needs_of(record) - layout.holds)
        if lost:
            notes.add(f"left out, as {layout.name} cannot hold {', '.join(lost)}", path)
            continue
        if layout.naming is not None and layout.naming.module(path, adapter.family) is None:
            notes.add(f"left out, as {layout.name} has no name for it", path)
            continue
        modules[path] = record
    embeddings = adapter.embeddings
    if embeddings and "embeddings" not in layout.holds:
        for word in embeddings:
            notes.add(f"left out, as {layout.name} cannot hold embeddings", word)
        embeddings = {}
    if not modules and not embeddings:
        raise CannotHold(f"the layout {layout.name} can hold nothing of it", advice="choose another with --to")
    return replace(adapter, modules=modules, embeddings=embeddings)
