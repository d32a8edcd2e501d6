"""Tensors of adapters that take arithmetic, and the steps that write them.

Views and arithmetic of one tensor are evaluated together, in float32 at least, with one rounding when it is written. What is
a tensor of the input as it stands is copied in blocks, like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdformats.views import Ref, Stored, View
from sdkernels import cast
from sdmerge.dtypes import TORCH
from sdmerge.errors import NonFiniteInput
from sdmerge.step import Read, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdformats.tensor import DType, Spec
    from sdformats.views import Load

    Arithmetic = Callable[..., Tensor]

_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class Computed(Ref):
    """The result of a function of tensors.

    Attributes:
        function: takes the operands in float32 or float64, and returns the result, of the spec's shape.
        operands: what it is a function of.
        result: shape, and the type it is rounded to when it is written.
    """

    function: Arithmetic
    operands: tuple[Ref, ...]
    result: Spec

    @property
    def spec(self) -> Spec:
        return self.result

    @property
    def parts(self) -> tuple[Ref, ...]:
        return self.operands

    def evaluate(self, load: Load, arrays: Any) -> Any:
        """See `Ref`. Among numpy arrays, which are bit patterns, the result is rounded to its type."""
        if arrays is np:
            return pattern(value(self), self.result.dtype)
        return self.function(*(operand.evaluate(load, arrays) for operand in self.operands))


@dataclass(frozen=True)
class Cast(View):
    """A tensor in another type."""

    dtype: DType

    @property
    def spec(self) -> Spec:
        return replace(self.of.spec, dtype=self.dtype)

    def evaluate(self, load: Load, arrays: Any) -> Any:
        if arrays is np:
            return pattern(value(self), self.dtype)
        return self.of.evaluate(load, arrays)


def fold(ref: Ref, factor: float) -> Ref:
    """Return a tensor times a number, in its own type."""
    return ref if factor == 1 else Computed(lambda values: values * factor, (ref,), ref.spec)


def in_type(ref: Ref, dtype: DType | None) -> Ref:
    """Return a floating tensor in another type; None: as it is."""
    return ref if dtype is None or not ref.spec.dtype.is_float or ref.spec.dtype is dtype else Cast(ref, dtype)


def value(ref: Ref, device: torch.device | str = "cpu") -> Tensor:
    """Read and compute a tensor, in float32 or float64; integers as float64."""
    return torch.as_tensor(ref.evaluate(lambda stored: _wide(_read(stored).to(device)), torch), device=device)


def finite(ref: Ref, path: Path) -> Tensor:
    """Read and compute a tensor of a small file, in float32.

    Raises:
        NonFiniteInput: it holds NaN or infinity.
    """
    found = value(ref).float()
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteInput(f"{path}: holds NaN or infinity (expected numbers: train it anew, or get another copy)")
    return found


def step_of(name: str, ref: Ref) -> Step:
    """Return the step that writes a tensor."""
    inner = ref.of if isinstance(ref, Cast) else ref
    if isinstance(inner, Stored):
        return Step(name, ref.spec, (Read(inner.source, inner.key),), why="copy")
    stored = tuple(dict.fromkeys(ref.stored()))
    reads = tuple(Read(one.source, one.key) for one in stored)
    return Step(name, ref.spec, reads, _Evaluation(ref, stored), whole=True, why="compute")


@dataclass(frozen=True)
class _Evaluation:
    """What a step computes from the tensors that it has read."""

    ref: Ref
    stored: tuple[Stored, ...]

    def __call__(self, tensors: Sequence[Tensor], _start: int) -> Tensor:
        read: Mapping[Stored, Tensor] = dict(zip(self.stored, tensors, strict=True))
        found = self.ref.evaluate(lambda stored: _wide(read[stored]), torch)
        return torch.as_tensor(found).reshape(self.ref.shape)


def _wide(values: Tensor) -> Tensor:
    floating = values.dtype.is_floating_point
    return values.to(cast.accumulator(values.dtype) if floating else torch.float64)


def _read(stored: Stored) -> Tensor:
    dtype = TORCH[stored.spec.dtype]
    if not stored.spec.numel:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(stored.source.read(stored.key), dtype=torch.uint8).view(dtype).reshape(stored.shape)


def pattern(values: Tensor, dtype: DType) -> np.ndarray[Any, Any]:
    """Return numbers rounded to a type, as bit patterns."""
    rounded = cast.narrow(values, torch.empty(values.shape, dtype=TORCH[dtype]))
    return rounded.view(_BITS[dtype.bits]).numpy().view(f"u{dtype.bits // 8}")
