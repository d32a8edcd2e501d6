"""What can be chosen for a training run, in groups; every field is an option of the command line and a name in ``--config``.

A field is annotated ``Annotated[type, Param("help", low, high)]``, as the parameters of a merge method are. The type is
float, int, bool, str or ``tuple[str, ...]``, perhaps ``| None``. Nothing here loads torch: help texts do not wait for it.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sdmerge.errors import RequestError, nearest
from sdmerge.method import Param, Parameter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdmerge.train.method import TrainingMethod

T = TypeVar("T")

PRECISIONS = ("fp32", "fp16", "bf16")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that is trained."""

    model: Annotated[str, Param("a single file or a diffusers folder: SD1, SD2 or SDXL")]
    tokenizer: Annotated[str | None, Param("a folder with CLIP's vocab.json and merges.txt, for a single file")] = None
    model_config: Annotated[
        str | None, Param("a diffusers folder whose configurations describe a file of unusual widths")
    ] = None
    clip_skip: Annotated[int, Param("condition on this layer of the text encoder, from the end", 1, 12)] = 1
    prediction: Annotated[str, Param("what the network predicts", choices=("auto", "epsilon", "v_prediction"))] = "auto"
    family: Annotated[str | None, Param("what the model is, where its structure does not tell")] = None


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The pictures and their captions."""

    data: Annotated[str, Param("a folder of pictures with .txt captions, or with a metadata.jsonl")]
    caption: Annotated[str | None, Param("the caption of pictures that have none")] = None
    resolution: Annotated[int, Param("side of a square of the trained area, in pixels; 0: the model's", 0, 4096)] = 0
    buckets: Annotated[bool, Param("keep each picture's aspect ratio, as near as steps allow; else cut squares")] = True
    bucket_step: Annotated[int, Param("sides are multiples of this, in pixels", 8, 512)] = 64
    flip: Annotated[bool, Param("mirror every other picture")] = False
    random_crop: Annotated[bool, Param("cut at random places, not from the middle (encodes every picture again)")] = (
        False
    )
    masked: Annotated[bool, Param("weigh the loss by the pictures' alpha channel")] = False
    caption_dropout: Annotated[float, Param("leave the caption empty with this probability", 0, 1)] = 0.0
    shuffle_captions: Annotated[bool, Param("put the parts between commas in random order")] = False
    keep_tokens: Annotated[int, Param("parts at the beginning that stay in place when shuffling", 0)] = 0
    cache_latents: Annotated[bool, Param("encode every picture once, before the first step")] = True
    sample_latents: Annotated[bool, Param("draw latents from the autoencoder's distribution; else take its mean")] = (
        True
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    min_snr: Annotated[float, Param("weigh steps by min(SNR, this) / SNR; 0: evenly; 5 is usual", 0)] = 0.0
    noise_offset: Annotated[float, Param("add noise of this size that is the same all over a channel", 0, 1)] = 0.0
    zero_snr: Annotated[bool, Param("rescale the schedule so that its last step is noise alone (v-prediction)")] = False
    min_timestep: Annotated[int, Param("the least noisy step that is trained", 0, 999)] = 0
    max_timestep: Annotated[int, Param("one more than the noisiest", 1, 1000)] = 1000


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How it is minimised."""

    lr: Annotated[float, Param("learning rate", 0)] = 1e-4
    optimizer: Annotated[
        str, Param("adamw8bit needs bitsandbytes, prodigy prodigyopt (with lr 1)", choices=OPTIMIZERS)
    ] = "adamw"
    weight_decay: Annotated[float, Param("AdamW's weight decay", 0)] = 0.01
    schedule: Annotated[str, Param("course of the learning rate after the warm-up", choices=SCHEDULES)] = "constant"
    warmup: Annotated[int, Param("steps in which the learning rate rises from zero", 0)] = 0
    clip_norm: Annotated[float, Param("longest gradient, others are shortened to it; 0: any", 0)] = 1.0
    ema: Annotated[float, Param("keep an average of the weights that decays so, and save it; 0: none", 0, 0.999999)] = (
        0.0
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long, how many, where."""

    steps: Annotated[int, Param("steps of the optimizer", 1)] = 1000
    batch: Annotated[int, Param("pictures at a time, on each device", 1, 4096)] = 1
    accumulate: Annotated[int, Param("batches whose gradients make one step", 1)] = 1
    seed: Annotated[int, Param("decides about every random number", 0, 2**32 - 1)] = 0
    precision: Annotated[str, Param("what the networks compute in; trained weights stay fp32", choices=PRECISIONS)] = (
        "fp32"
    )
    checkpointing: Annotated[bool, Param("compute activations again in the backward pass: less memory, more time")] = (
        False
    )
    device: Annotated[str, Param("auto or cpu; accelerate picks the GPU")] = "auto"


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written."""

    output: Annotated[str, Param("the file or folder to write; its companions stand in OUTPUT.run")]
    dtype: Annotated[str, Param("type of the tensors written", choices=("keep", "fp32", "fp16", "bf16"))] = "keep"
    save_every: Annotated[int, Param("steps after which the run's state is saved, to resume from; 0: never", 0)] = 0
    export_every: Annotated[int, Param("steps after which what is trained so far is written beside the output", 0)] = 0
    keep: Annotated[int, Param("saved states that are kept", 1)] = 1
    sample_every: Annotated[int, Param("steps after which pictures are painted; 0: never", 0)] = 0
    sample_prompt: Annotated[tuple[str, ...], Param("what is painted; may be given several times")] = ()
    sample_steps: Annotated[int, Param("steps of a painted picture", 1, 1000)] = 30
    guidance: Annotated[float, Param("scale of classifier-free guidance for painted pictures", 0)] = 7.0
    resume: Annotated[bool, Param("go on from the newest saved state")] = False
    overwrite: Annotated[bool, Param("replace an existing output, and begin again")] = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of them."""

    model: ModelSettings
    data: DataSettings
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    output: OutputSettings


def painting_of(settings: Settings) -> dict[str, Any]:
    """Return what pictures are painted with in a run, as fields of `sdmerge.sampling.Painting`."""
    return {
        "steps": settings.output.sample_steps,
        "guidance": settings.output.guidance,
        "prediction": settings.model.prediction,
        "zero_snr": settings.loss.zero_snr,
    }


GROUPS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "loss": LossSettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
    "output": OutputSettings,
}
"""The groups by their names in `Settings`."""


def fields_of(cls: type[Any], defaults: Mapping[str, Any] | None = None) -> Iterator[Parameter]:
    """Yield a group's fields; `defaults` replace their own."""
    hints = get_type_hints(cls, include_extras=True)
    for one in dataclasses.fields(cls):
        kind, param = get_args(hints[one.name])
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(inner for inner in get_args(kind) if inner is not types.NoneType)
        kind = list if get_origin(kind) is tuple else kind
        default = inspect.Parameter.empty if one.default is dataclasses.MISSING else one.default
        yield Parameter(one.name, param, kind, (defaults or {}).get(one.name, default))


def made(cls: type[T], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> T:
    """Make a group of checked values; names that are not its fields are passed over.

    Raises:
        RequestError: a value is missing, of another type or out of its range.
    """
    found = {}
    for one in fields_of(cls, defaults):
        value = values.get(one.name, one.default)
        if one.required and value is one.default:
            raise RequestError(f"{one.name} is missing: {one.param.help} (--{one.name.replace('_', '-')})")
        found[one.name] = _checked(one, value)
    return cls(**found)


def _checked(one: Parameter, value: Any) -> Any:
    if value is None and one.default is None:
        return None
    if one.kind is list:
        texts = (value,) if isinstance(value, str) else tuple(value)
        return tuple(dataclasses.replace(one, kind=str).checked(text) for text in texts)
    return one.checked(value)


def fields_for(method: type[TrainingMethod]) -> Iterator[tuple[type[Any], Parameter]]:
    """Yield every setting that a method takes, with the group that it is in: its own first."""
    for one in fields_of(method):
        yield method, one
    for cls in GROUPS.values():
        for one in fields_of(cls, method.defaults):
            if not method.takes or one.name in method.takes:
                yield cls, one


def check_names(names: Mapping[str, Any], groups: Mapping[str, type[Any]]) -> None:
    """Refuse a name that is no setting; of those that all methods share, ``method`` among the groups may take only some.

    Raises:
        RequestError: so it is; the nearest is named.
    """
    takes = getattr(groups.get("method"), "takes", ())
    known = [
        one.name
        for group, cls in groups.items()
        for one in fields_of(cls)
        if not takes or group == "method" or one.name in takes
    ]
    for name in names:
        if name not in known:
            raise RequestError(f"{name!r} is no setting of this method{nearest(name, known)}")
