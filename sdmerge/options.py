"""Everything that can be chosen beside the merge itself, in one place for the python API and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from sdformats.tensor import DType
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

Missing = Literal["keep", "drop", "error"]
Ema = Literal["keep", "drop", "use"]
Overflow = Literal["refuse", "saturate", "inf"]
Only = Literal["unet", "te", "vae"]
Prediction = Literal["epsilon", "v_prediction"]
Form = Literal["lora", "full"]
"""What every algorithm of an adapter can be turned into."""

OUTPUT_TYPES: dict[str, DType | None] = {
    "keep": None,
    "fp32": DType.F32,
    "fp16": DType.F16,
    "bf16": DType.BF16,
    "fp8_e4m3fn": DType.F8_E4M3,
    "fp8_e5m2": DType.F8_E5M2,
}
"""Names of the output types; ``keep`` takes each tensor's type from A."""
RECIPE_OPTIONS = ("dtype", "missing", "ema", "overflow", "allow_nonfinite", "vae", "family", "stochastic_rounding")
"""What decides about the output's bytes, so that it belongs into a recipe; all else is the machine's and the user's."""


class OptionFields(TypedDict, total=False):
    """The keyword arguments that every function of the python API takes; see `Options`."""

    dtype: str
    device: str
    threads: int | None
    overwrite: bool
    dry_run: bool
    missing: Missing
    ema: Ema
    overflow: Overflow
    allow_nonfinite: bool
    vae: str | Path | None
    family: str | None
    kind: str | None
    hash_inputs: bool
    stochastic_rounding: int | None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read, decide and write.

    Attributes:
        dtype: element type of the output's floating tensors; one of `OUTPUT_TYPES`.
        device: where to compute: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` takes a GPU where more than half of the
            bytes need whole tensors; merges that only stream are bound by reading and writing, and stay on the CPU.
        threads: how many threads read, compute and write; None takes the processor's cores, 8 at most.
        overwrite: whether an existing output may be replaced.
        dry_run: plan everything, write nothing.
        missing: what to do with a tensor of A that another model lacks: ``keep`` A's value, ``drop`` it, or ``error``.
        ema: what to do with ``model_ema.*``: ``keep`` A's, ``drop`` them, or ``use`` each model's average instead of its
            plain weights.
        overflow: what to do with values too large for the output type: ``refuse``, ``saturate`` or write ``inf``.
        allow_nonfinite: go on where an input holds NaN or infinity.
        vae: a file whose VAE replaces A's.
        family: what the models are, where the structure does not tell.
        kind: what a file is that could be several things, as ``aesthetic`` or ``embedding``.
        hash_inputs: put the inputs' sha256 into the metadata (costs one more read of each).
        stochastic_rounding: a seed: results are rounded up or down with the probability of their nearness, by random numbers
            of seed, tensor and element; None rounds to nearest.
        progress: called with a label and a total in bytes; returns a context that yields a function taking bytes done.
    """

    dtype: str = "keep"
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    missing: Missing = "keep"
    ema: Ema = "keep"
    overflow: Overflow = "refuse"
    allow_nonfinite: bool = False
    vae: str | Path | None = None
    family: str | None = None
    kind: str | None = None
    hash_inputs: bool = False
    stochastic_rounding: int | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, tuple(OUTPUT_TYPES))
        _one_of("missing", self.missing, get_args(Missing))
        _one_of("ema", self.ema, get_args(Ema))
        _one_of("overflow", self.overflow, get_args(Overflow))
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise RequestError(f"threads is {self.threads} (expected 1 to 256)")

    @property
    def output_type(self) -> DType | None:
        """The element type of floating tensors in the output; None keeps A's."""
        return OUTPUT_TYPES[self.dtype]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"{name} is {value!r} (expected one of {', '.join(known)})")
