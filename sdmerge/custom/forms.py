"""The forms of a delta: whole weights need nothing to be renamed, compressed ones the model to become whole."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.adapters.errors import CannotHold
from sdformats.custom_diffusion.delta import CustomDiffusion, Product, read_custom_diffusion
from sdformats.custom_diffusion.kind import SGM
from sdformats.custom_diffusion.write import WRITERS
from sdformats.files import open_source
from sdformats.tensor import Spec
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref
from sdmerge.errors import FamilyError, MismatchError, RequestError, nearest
from sdmerge.execute import no_collection, open_model
from sdmerge.lora.places import Places
from sdmerge.lora.refs import Computed
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, typed, write_out

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdformats.adapters.layout import Written
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.conversion import Conversion
    from sdmerge.execute import Report
    from sdmerge.options import Options

COMPRESSED = "compressed"


def open_delta(stack: ExitStack, path: Path, options: Options) -> tuple[TensorSource, CustomDiffusion, Detection]:
    """Open a delta for as long as `stack` lives.

    Raises:
        RequestError: it is something else.
        sdformats.errors.FormatError: it cannot be read.
    """
    source, seen = open_model(stack, path, options)
    if seen.kind != "custom-diffusion":
        raise RequestError(f"{path}: is {seen.kind} (expected a Custom Diffusion delta)")
    return source, read_custom_diffusion(source), seen


def open_base(stack: ExitStack, path: Path, family: str | None) -> Places:
    """Open the model that deltas are for.

    Raises:
        FamilyError: it is of another family.
        sdformats.errors.FormatError: it cannot be read.
    """
    places = Places(stack.enter_context(open_source(path)))
    if family and places.family and family != places.family:
        raise FamilyError(f"{path}: is {places.family}, and the delta is for {family}")
    return places


def weight_in(places: Places, name: str) -> Ref:
    """Return the model's own tensor of that name.

    Raises:
        MismatchError: it has none.
    """
    found = places.weight(f"unet.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
    if found is None:
        raise MismatchError(f"{places.source.path}: has no {name}")
    return found


def whole(weight: Ref | Product | None, base: Ref) -> Ref:
    """Return a delta's weight as a whole; the model's own where the delta has none.

    Raises:
        MismatchError: it has another size than the model's.
    """
    if weight is None:
        return base
    if isinstance(weight, Ref):
        shape, made = weight.shape, weight
    else:
        shape = (weight.up.shape[0], weight.down.shape[1])
        dtype = weight.up.spec.dtype if base.spec.dtype.bits < 16 else base.spec.dtype
        made = Computed(_added, (base, weight.up, weight.down), Spec(shape, dtype))
    if shape != base.shape:
        raise MismatchError(f"{base}: is {list(base.shape)}, and the delta has {list(shape)}")
    return made


def _added(base: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return base + up @ down


def convert_custom(
    source: TensorSource, seen: Detection, target: Path, conversion: Conversion, options: Options, started: float
) -> Report:
    """Write a delta in another of its own forms.

    Args:
        source: the delta, open.
        seen: what it is.
        target: a file; for diffusers' form with words a folder.
        conversion: ``to``, ``allow_loss``, and ``base``, which makes compressed weights whole.
        options: see `Options`.
        started: when the command began, as `time.perf_counter` told it.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the form has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    with ExitStack() as stack, no_collection():
        record = read_custom_diffusion(source)
        notes = Notes()
        notes.take(record.notes)
        sources = [source]
        layout = layout_for(conversion.to, source, seen, target)
        if conversion.base is not None:
            places = open_base(stack, conversion.base, seen.family)
            sources.append(places.source)
            weights = {name: whole(one, weight_in(places, name)) if isinstance(one, Product) else one
                       for name, one in record.weights.items()}  # fmt: skip
            record = replace(record, weights=weights)
        written = write_form(record, layout, target, notes, allow_loss=conversion.allow_loss)
        written = typed(written, options.output_type)
        notes.add(f"{seen.spelling} to {layout}")
        plan = plan_of(written, tuple(sources), seen.family, notes)
        return write_out(plan, written, target, options, started, "converting")


def layout_for(to: str | None, source: TensorSource, seen: Detection, target: Path) -> str:
    """Return the form to write: the one asked for, or the one there is.

    Raises:
        RequestError: there is none of that name.
    """
    original = any(name.startswith(SGM) for name in source.specs)
    kept = ("original" if original else "delta") if seen.spelling == COMPRESSED else seen.spelling
    if kept == "diffusers" and target.suffix and not to:
        kept = "delta"
    wanted = to or kept or "delta"
    if wanted == COMPRESSED:
        raise RequestError(
            "to compress a delta takes the model and a bound: sdmerge compress-custom DELTA --base MODEL"
        )
    if wanted not in WRITERS:
        known = ", ".join(WRITERS)
        raise RequestError(
            f"{wanted!r} is no form of a delta (expected {known}, or an adapter's layout){nearest(wanted, WRITERS)}"
        )
    return wanted


def write_form(record: CustomDiffusion, layout: str, target: Path, notes: Notes, *, allow_loss: bool) -> Written:
    """Return what a form makes of a delta.

    Raises:
        CannotHold: it has no place for something.
    """
    if layout == "diffusers" and target.suffix and record.words:
        if not allow_loss:
            raise CannotHold(
                f"the layout diffusers keeps words in files of their own ({', '.join(record.words)})",
                advice="give a folder for the output, or --allow-loss",
            )
        notes.add(f"left out, as they would be files of their own: {', '.join(record.words)}")
        record = replace(record, words={})
    if layout == "original" and record.words:
        notes.add(f"the layout original keeps words without their names: {', '.join(record.words)}")
    written = WRITERS[layout](record)
    if layout == "diffusers" and target.suffix:
        bare = {name.partition(".safetensors/")[2]: ref for name, ref in written.tensors.items()}
        return replace(written, tensors=bare, tree={name: TensorNamed(name) for name in bare})
    return written
