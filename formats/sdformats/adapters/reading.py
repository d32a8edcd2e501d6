"""Read and write adapters whose layout is a matter of names. Layouts of other kinds bring their own functions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.family import family_of
from sdformats.adapters.fused import fuse, split
from sdformats.adapters.layout import AdapterFile, AdapterLayout, Written
from sdformats.adapters.records import GLoRA, LoHa, LoKr, LoRA, Rows, labels
from sdformats.adapters.roles import assemble, disassemble
from sdformats.errors import CorruptFile, FormatError, UnsupportedFile
from sdformats.views import Ref, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdformats.adapters.fused import Fold
    from sdformats.adapters.naming import Name, Naming
    from sdformats.adapters.record import Record

_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|[^.]+)")
_SHOWN = 4
_BY_FACTORS = ("lora", "locon", "tucker", "loha", "lokr", "glora", "oft", "boft")
EVERYTHING = frozenset({*_BY_FACTORS, "ia3", "full", "norm", "dora", "bias", "embeddings", "reshape"})
"""What LyCORIS's names can say."""


def read_named(layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read an adapter by the names of its tensors.

    Raises:
        FormatError: a name has no place in the layout, or a module's tensors do not belong together.
    """
    assert layout.naming is not None, "layouts without names bring a function of their own"
    grouped, embeddings, unknown = sort_names(layout.naming, file)
    if unknown:
        raise UnsupportedFile(
            f"is no name of the layout {layout.name}{more(unknown)}",
            path=file.source.path,
            key=unknown[0],
            advice="nothing is left out in silence: tell us about the file, or take these tensors out",
        )
    modules: dict[str, Record] = {}
    for module, (name, tensors) in grouped.items():
        modules |= parts(file, module, name, tensors, modules)
    adapter = Adapter(modules, embeddings, kept_metadata(layout, file.source.metadata))
    return replace(adapter, family=family_of(adapter, {name.table for name, _ in grouped.values()}))


Grouped = dict[str, tuple["Name", dict[str, Ref]]]


def sort_names(naming: Naming, file: AdapterFile) -> tuple[Grouped, dict[str, dict[str, Ref]], list[str]]:
    """Return each module's tensors by role, bundled embeddings, and names that mean nothing here.

    Raises:
        CorruptFile: a module has two tensors for one role.
    """
    grouped: Grouped = {}
    embeddings: dict[str, dict[str, Ref]] = {}
    unknown: list[str] = []
    for key in file.source.specs:
        ref = Stored(file.source, key)
        name = naming.understand(key)
        if name is not None:
            tensors = grouped.setdefault(name.module, (name, {}))[1]
            if name.role in tensors:
                raise CorruptFile(f"has two tensors for {name.role}", path=file.source.path, key=key)
            tensors[name.role] = ref
        elif bundled := _BUNDLED.fullmatch(key):
            inner = bundled[2].removeprefix("string_to_param.")
            embeddings.setdefault(bundled[1], {})[inner] = ref
        else:
            unknown.append(key)
    return grouped, embeddings, unknown


def parts(
    file: AdapterFile, module: str, name: Name, tensors: Mapping[str, Ref], known: Mapping[str, Record]
) -> dict[str, Record]:
    """Return the records of our modules that a file's module is.

    Raises:
        FormatError: its tensors do not belong together, or another module of the file is the same.
    """
    try:
        found = split(assemble(module, tensors), name.fusion)
    except FormatError as error:
        error.path, error.key = error.path or file.source.path, error.key or module
        raise
    paths = {f"{name.component}.{part}": record for part, record in found.items()}
    if doubled := [path for path in paths if path in known]:
        raise CorruptFile(f"names the module {doubled[0]} a second time", path=file.source.path, key=module)
    return paths


def kept_metadata(layout: AdapterLayout, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the texts that are not the layout's own."""
    own = re.compile("|".join((*layout.keep, "format$")))
    return {key: value for key, value in metadata.items() if not own.match(key)}


def more(items: list[str]) -> str:
    """Say how many follow the first."""
    return f", nor are {len(items) - 1:,} more" if len(items) > 1 else ""


def check_holds(layout: AdapterLayout, adapter: Adapter, *, converts: bool = False) -> None:
    """Refuse what a layout has no place for.

    Args:
        layout: what is to be written.
        adapter: what is to be in it.
        converts: whether the request is a conversion, which has options for other forms and for losses.

    Raises:
        CannotHold: naming modules and algorithm, and the way out.
    """
    if layout.write is None:
        raise CannotHold(f"the layout {layout.name} is only read", advice="choose another with --to")
    if not adapter.scaled:
        raise CannotHold(
            "has no known scale: it is a PEFT file without its adapter_config.json",
            advice="put that beside it, or give it with --adapter-config FILE",
        )
    if layout.families and adapter.family is not None and adapter.family not in layout.families:
        raise CannotHold(
            f"is for {adapter.family}, which the layout {layout.name} does not exist for",
            expected=", ".join(layout.families),
            advice=ways_out(_needs(adapter), adapter.family),
        )
    by_need: dict[str, list[str]] = {}
    for path, record in adapter.modules.items():
        for need in needs_of(record) - layout.holds:
            by_need.setdefault(need, []).append(path)
    if adapter.embeddings and "embeddings" not in layout.holds:
        by_need["embeddings"] = list(adapter.embeddings)
    for need, paths in sorted(by_need.items()):
        many = "module has" if len(paths) == 1 else "modules have"
        raise CannotHold(
            f"{len(paths):,} {many} {need}, which the layout {layout.name} cannot hold: {listed(paths)}",
            advice=(f"{_other_form(need)}--allow-loss leaves them out; " if converts else "")
            + ways_out(_needs(adapter), adapter.family),
        )


def _other_form(need: str) -> str:
    if need in ("tucker", "loha", "lokr", "rows"):
        return "--as lora turns them into LoRA exactly; "
    return (
        "--as full with --base MODEL turns them into differences; " if need in ("glora", "ia3", "oft", "boft") else ""
    )


def needs_of(record: Record) -> frozenset[str]:
    """Return what a layout must be able to hold for one record."""
    found = set(labels(record))
    if record.bias is not None and record.algorithm not in ("norm", "full"):
        found.add("bias")
    if isinstance(record, LoRA) and record.reshape is not None:
        found.add("reshape")
    if record.magnitude is not None and record.magnitude.axis == "in":
        found.add("dora over columns")
    if getattr(record, "replaces", False):
        found.add("replaced weights")
    return frozenset(found)


def _needs(adapter: Adapter) -> frozenset[str]:
    found = {need for record in adapter.modules.values() for need in needs_of(record)}
    return frozenset(found | ({"embeddings"} if adapter.embeddings else set()))


def ways_out(needs: frozenset[str], family: str | None) -> str:
    """Return which layouts could hold it, for errors."""
    from sdformats.adapters.layouts import LAYOUTS

    able = [
        layout.name
        for layout in LAYOUTS
        if layout.write is not None
        and needs <= layout.holds
        and (family is None or not layout.families or family in layout.families)
    ]
    return f"these layouts hold all of it: {', '.join(able)}" if able else "no layout holds all of it"


def listed(paths: Iterable[str]) -> str:
    """Name the first few of some modules."""
    names = list(paths)
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def write_named(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> Written:
    """Write an adapter by names.

    Raises:
        CannotHold: a module or a role has no name in the layout.
    """
    assert layout.naming is not None, "layouts without names bring a function of their own"
    tensors: dict[str, Ref] = {}
    for module, record in fused_modules(layout, adapter, fold).items():
        folded = scale_folded(module, record, fold) if layout.alpha == "none" else record
        tensors |= named(layout, module, folded)
    for name, inside in adapter.embeddings.items():
        for key, ref in inside.items():
            inner = "string_to_param.*" if key == "*" else key
            tensors[f"bundle_emb.{name}.{inner}"] = ref
    return Written(tensors, dict(adapter.metadata))


def fused_modules(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> dict[str, Record]:
    """Return a file's modules, in the order of the adapter's.

    Raises:
        CannotHold: a module has no name in the layout, or is a part of a part.
    """
    assert layout.naming is not None, "layouts without names bring a function of their own"
    spelled: dict[str, list[str]] = {}
    for path in adapter.modules:
        module = layout.naming.module(path, adapter.family)
        if module is None:
            raise CannotHold(
                f"has no name for this module of {adapter.family or 'an unknown family'} in the layout {layout.name}",
                key=path,
                advice="choose another with --to",
            )
        spelled.setdefault(module, []).append(path)
    found: dict[str, Record] = {}
    for module, paths in spelled.items():
        if len(paths) == 1 and isinstance(only := adapter.modules[paths[0]], Rows) and only.of.algorithm == "rows":
            raise CannotHold("is part of a part", key=module)
        fusion = layout.naming.fusion(module)
        found[module] = fuse(module, [adapter.modules.get(part) for part in fusion.parts], fusion, fold)
    return found


def named(layout: AdapterLayout, module: str, record: Record) -> dict[str, Ref]:
    """Return a module's tensors by their names in a file.

    Raises:
        CannotHold: it is part of a fused module that cannot be cut, or the layout has no name for a tensor of it.
    """
    assert layout.naming is not None, "layouts without names bring a function of their own"
    if isinstance(record, Rows):
        raise CannotHold(
            f"is part of a fused module's {record.of.algorithm}, which cannot be cut",
            key=module,
            advice="use --as lora",
        )
    found: dict[str, Ref] = {}
    for role, ref in disassemble(record).items():
        name = layout.naming.spell(module, role)
        if name is None:
            raise CannotHold(f"has {role}, which the layout {layout.name} has no name for", key=module)
        found[name] = ref
    return found


def scale_folded(module: str, record: Record, fold: Fold) -> Record:
    """Return a record at scale 1 that does the same: the first factor is multiplied.

    Raises:
        CannotHold: it is a GLoRA, which has no such factor.
    """
    scale = record.scale
    if scale == 1:
        return replace(record, alpha=None)
    match record:
        case LoRA():
            return replace(record, up=fold(record.up, scale), alpha=None)
        case LoHa():
            return replace(record, w1_a=fold(record.w1_a, scale), alpha=None)
        case LoKr(w1=None, w1_a=Ref() as first):
            return replace(record, w1_a=fold(first, scale), alpha=None)
        case LoKr(w1=Ref() as first):
            return replace(record, w1=fold(first, scale), alpha=None)
        case GLoRA():
            raise CannotHold(f"has the scale {scale:g}, for which there is no place", key=module)
        case _:
            return record
