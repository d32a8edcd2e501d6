"""What a merge does with everything that is not plainly the same tensor in every model. One place, each with its option.

A's keys decide what the output holds. Nothing follows a policy in silence: each decision becomes a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sdformats.tensor import DType, Spec
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.step import Read, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.expression import Expression
    from sdmerge.options import Options

EMA = "model_ema."
COMPUTABLE = frozenset({DType.F8_E4M3, DType.F8_E5M2, DType.F16, DType.BF16, DType.F32, DType.F64})
"""Element types that can be merged; all others are copied from A."""

_SCHEDULE = frozenset(
    {
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "denoiser.sigmas",
        "log_one_minus_alphas_cumprod",
        "logvar",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    }
)
"""The noise schedule, as buffers of old checkpoints: no weights, and spoiled by a narrower type."""
_MARKERS = ("v_pred", "ztsnr")
_FIRST_CONVS = ("input_blocks.0.0.weight", "conv_in.weight", "img_in.weight", "x_embedder.weight")
_NARROW_OK = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "")
_VAE_PREFIX = {"single-file": "first_stage_model.", "diffusers": "vae."}


@dataclass
class Notes:
    """Collects what was decided, grouped so that a thousand keys make one line."""

    groups: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, key: str | None = None) -> None:
        """Note `text`, for one key or as it is."""
        self.groups.setdefault(text, [])
        if key is not None:
            self.groups[text].append(key)

    def take(self, texts: Iterable[str]) -> None:
        """Note what was noted elsewhere."""
        for text in texts:
            self.add(text)

    def lines(self) -> tuple[str, ...]:
        """Return one line a note, with the number of keys and the first three."""
        return tuple(text if not keys else f"{text}: {listing(keys)}" for text, keys in self.groups.items())


def listing(keys: Sequence[str]) -> str:
    """Name up to three keys, and say how many there are beyond."""
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


@dataclass(frozen=True)
class View:
    """What a model offers to a merge: its tensors under the names that count, after EMA and fp8 factors are settled."""

    label: str
    source: TensorSource
    detection: Detection
    tensors: Mapping[str, Read]


def view(label: str, source: TensorSource, detection: Detection, options: Options, notes: Notes) -> View:
    """Settle which stored tensors stand for which names.

    ``model_ema.*`` under ``ema="use"`` takes the place of the plain weights; fp8 weights with a ``scale_weight`` are to be
    multiplied with it, and the factors are no tensors of the model any more.
    """
    tensors = {name: Read(source, key) for name, key in averaged(label, source.specs, options, notes).items()}
    return View(label, source, detection, _scaled(label, tensors, notes))


def averaged(label: str, specs: Mapping[str, Spec], options: Options, notes: Notes) -> dict[str, str]:
    """Settle what becomes of a moving average: return the stored tensor by the name that it stands for."""
    found: dict[str, str] = {}
    used = 0
    for name in specs:
        if name.startswith(EMA):
            if options.ema == "keep":
                found[name] = name
            continue
        average = EMA + name.removeprefix("model.").replace(".", "")
        taken = options.ema == "use" and average in specs
        found[name] = average if taken else name
        used += taken
    if options.ema == "use":
        notes.add(
            f"{label}: {used} tensors taken from its moving average" if used else f"{label}: has no moving average"
        )
    elif options.ema == "drop" and any(name.startswith(EMA) for name in specs):
        notes.add(f"{label}: its moving average (model_ema.*) is left out")
    return found


def _scaled(label: str, tensors: dict[str, Read], notes: Notes) -> dict[str, Read]:
    found: dict[str, Read] = {}
    for name, read in tensors.items():
        stem, _, last = name.rpartition(".")
        if name == "scaled_fp8" or (last in ("scale_weight", "scale_input") and f"{stem}.weight" in tensors):
            continue
        scale = f"{stem}.scale_weight" if last == "weight" else ""
        if scale in tensors and read.spec.dtype in (DType.F8_E4M3, DType.F8_E5M2):
            factor = tensors[scale].spec
            if factor.numel not in (1, *read.spec.shape[:1]) or factor.dtype not in COMPUTABLE:
                raise MismatchError(
                    f"{tensors[scale]}: is {factor} (expected one factor, or one for each of {read.spec.shape[:1]} rows)"
                )
            notes.add(
                f"{label}: fp8 weights are multiplied with their scale_weight first; the factors are left out", name
            )
            read = Read(read.source, read.key, tensors[scale].key)  # noqa: PLW2901 - the same read, with its factor
        found[name] = read
    return found


def check_together(views: Sequence[View], options: Options, notes: Notes) -> None:
    """Refuse models that cannot be merged, before anything is written.

    Raises:
        FamilyError: different families, different spellings, or nothing in common.
        RequestError: something that is no model.
    """
    for one in views:
        _check_model(one)
    first = views[0]
    for other in views[1:]:
        _check_pair(first, other, options)
        _note_differences(first, other, notes)


def _check_model(one: View) -> None:
    if one.detection.kind == "adapter":
        raise RequestError(
            f"{one.source.path}: is an adapter (LoRA or the like), whose factors cannot be added up one by one; "
            "expected a checkpoint"
        )
    if one.detection.kind == "embedding":
        raise RequestError(
            f"{one.source.path}: is a textual-inversion embedding; mix embeddings with `sdmerge embedding mix` "
            "(expected a checkpoint)"
        )


def _check_pair(first: View, other: View, options: Options) -> None:
    mine, theirs = first.detection, other.detection
    if options.family is None and mine.family and theirs.family and mine.family != theirs.family:
        raise FamilyError(
            f"{first.label} is {mine.family} and {other.label} is {theirs.family} ({first.source.path}, "
            f"{other.source.path}): models of different families cannot be merged; --family overrides what they look like"
        )
    if mine.spelling and theirs.spelling and mine.spelling != theirs.spelling:
        raise FamilyError(
            f"{first.label} is spelled as {mine.spelling} and {other.label} as {theirs.spelling} ({first.source.path}, "
            f"{other.source.path}): their tensors have different names; use models that are spelled alike"
        )
    if not first.tensors.keys() & other.tensors.keys():
        raise FamilyError(
            f"{first.source.path} and {other.source.path} have no tensor in common; nothing can be merged"
        )


def _note_differences(first: View, other: View, notes: Notes) -> None:
    """Say in what models of one family differ though they are merged."""
    mine, theirs = first.detection, other.detection
    if mine.variant != theirs.variant and mine.family == theirs.family:
        notes.add(f"{first.label} is {mine.family} {mine.variant}, {other.label} is {theirs.family} {theirs.variant}")
    for marker in _MARKERS:
        if (marker in first.tensors) != (marker in other.tensors):
            has = first if marker in first.tensors else other
            notes.add(f"only some of the models carry the marker {marker!r} ({has.label} does); the output follows A")


def reports_extra(name: str) -> bool:
    """Whether a key that only other models have is worth a note."""
    return not name.startswith(EMA) and name not in _MARKERS


def merge_step(
    name: str, labels: Sequence[str], reads: Sequence[Read], call: Expression, options: Options, notes: Notes
) -> Step:
    """Return the step that computes one tensor.

    Args:
        name: its name.
        labels: which models the reads come from.
        reads: what is computed on, A's first: its shape and type count.
        call: the merge.
        options: the policies.
        notes: takes what is decided.

    Raises:
        MismatchError: the tensors do not fit together.
    """
    first = reads[0]
    spec = Spec(first.spec.shape, _output_type(first, options, notes))
    for label, read in zip(labels[1:], reads[1:], strict=True):
        if read.spec.dtype not in COMPUTABLE:
            raise MismatchError(f"{read}: is {read.spec} in {label}, a type that cannot be merged (A has {first.spec})")
        if read.spec.dtype != first.spec.dtype and read.scale is None and first.scale is None:
            notes.add(f"{label} holds {read.spec.dtype} where A holds {first.spec.dtype}; computed in float32", name)
    if len({read.spec.shape for read in reads}) > 1:
        return _shared_channels(name, spec, reads, call, notes)
    whole = not call.elementwise or any(read.scale for read in reads)
    return Step(name, spec, tuple(reads), call, whole, call.propagates)


def copy_step(name: str, read: Read, options: Options, notes: Notes, why: str = "copy") -> Step:
    """Take a tensor as it is, in the output's type where it is a floating one."""
    if read.scale is not None:
        return Step(
            name, Spec(read.spec.shape, _output_type(read, options, notes)), (read,), _same, whole=True, why=why
        )
    keep = read.spec.dtype not in COMPUTABLE or name in _SCHEDULE or options.output_type is None
    dtype = read.spec.dtype if keep or options.output_type is None else options.output_type
    return Step(name, Spec(read.spec.shape, dtype), (read,), why=why)


def _same(tensors: Sequence[Tensor], _start: int) -> Tensor:
    return tensors[0]


def kept_as_is(name: str, read: Read, options: Options, notes: Notes) -> Step | None:
    """Return the step for a tensor that is never blended, or None."""
    if name.rpartition(".")[2] == "position_ids" and read.spec.dtype in COMPUTABLE:
        notes.add("position_ids were stored as floating numbers and are rebuilt as whole ones", name)
        return Step(name, Spec(read.spec.shape, DType.I64), (read,), _arange, whole=True, why="rebuild")
    special = name.rpartition(".")[2] in ("position_ids", "logit_scale") or name in _SCHEDULE or name in _MARKERS
    if special or read.spec.dtype not in COMPUTABLE or name.startswith(EMA):
        return copy_step(name, read, options, notes)
    return None


def _arange(tensors: Sequence[Tensor], _start: int) -> Tensor:
    import torch

    return torch.arange(tensors[0].numel()).reshape(tensors[0].shape)


def keeps_missing(name: str, first: Read, absent: str, options: Options, notes: Notes) -> bool:
    """Decide about a tensor that some models lack: True keeps A's value, False leaves it out.

    Raises:
        MismatchError: ``missing="error"``.
    """
    if options.missing == "error":
        raise MismatchError(
            f"{first}: is missing in {absent}; --missing keep takes A's value, --missing drop leaves it out"
        )
    kept = options.missing == "keep"
    what = "A's value is kept" if kept else "left out"
    notes.add(f"missing in {absent}, {what}", name)
    return kept


def _output_type(first: Read, options: Options, notes: Notes) -> DType:
    if options.output_type is not None:
        return options.output_type
    if first.scale is not None:
        notes.add("A is fp8 with factors; what was scaled is written as F16 (choose another type with --dtype)")
        return DType.F16
    return first.spec.dtype


def _shared_channels(name: str, spec: Spec, reads: Sequence[Read], call: Expression, notes: Notes) -> Step:
    """Merge the input channels that all first convolutions have; A's further ones stay (inpainting 9, pix2pix 8)."""
    shapes = [read.spec.shape for read in reads]
    first_conv = any(name == prefix + conv for prefix in _NARROW_OK for conv in _FIRST_CONVS)
    alike = len({(s[:1], s[2:]) for s in shapes}) == 1 and all(len(s) >= 2 for s in shapes)
    if not (first_conv and alike):
        found = ", ".join(f"{list(read.spec.shape)} in {read.source.path.name}" for read in reads)
        raise MismatchError(f"{name!r}: has different shapes: {found} (expected one shape)")
    shared = min(shape[1] for shape in shapes)
    notes.add(
        f"the first convolution has {', '.join(str(s[1]) for s in shapes)} input channels in the models: the first {shared} are "
        f"merged, A's other {shapes[0][1] - shared} are kept",
        name,
    )
    return Step(name, spec, tuple(reads), partial(_merge_channels, call, shared), whole=True, why="channels")


def _merge_channels(call: Expression, shared: int, tensors: Sequence[Tensor], start: int) -> Tensor:
    merged = call([t[:, :shared].contiguous() for t in tensors], start)
    result = tensors[0].to(merged.dtype, copy=True)
    result[:, :shared] = merged
    return result


def vae_steps(names: Iterable[str], vae: View, first: View, options: Options, notes: Notes) -> dict[str, Step]:
    """Return steps that take the VAE from `vae`, under A's names.

    Raises:
        MismatchError: a tensor is missing in the VAE file, or has another shape than A's.
    """
    prefix = _VAE_PREFIX[first.detection.spelling or "single-file"]
    given = {name.removeprefix(prefix): read for name, read in vae.tensors.items() if vae_name(name, prefix, vae)}
    wanted = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    lacking = sorted(wanted - given.keys())
    if lacking or not given:
        raise MismatchError(
            f"{vae.source.path}: has no {prefix}{(lacking or ['*'])[0]} (expected a VAE spelled as in A, alone or in a model)"
        )
    steps: dict[str, Step] = {}
    for key, read in given.items():
        name = prefix + key
        mine = first.tensors.get(name)
        if mine is not None and mine.spec.shape != read.spec.shape:
            raise MismatchError(f"{read}: is {list(read.spec.shape)} (expected {list(mine.spec.shape)}, as in A)")
        step = copy_step(name, read, options, notes, why="vae")
        if mine is not None and options.output_type is None and {mine.spec.dtype, read.spec.dtype} <= COMPUTABLE:
            step = Step(name, Spec(read.spec.shape, mine.spec.dtype), (read,), step.compute, step.whole, why="vae")
        steps[name] = step
    notes.add(f"the VAE is taken from {vae.source.path.name}")
    return steps


def vae_name(name: str, prefix: str, vae: View) -> bool:
    """Whether `name` belongs to the VAE of a file that is a VAE alone, or a whole model."""
    if vae.detection.kind == "vae" and not name.startswith(prefix):
        return name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    return name.startswith(prefix)
