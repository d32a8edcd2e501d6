"""Views in which tensors do not lie as in their files: transposed, repeated, along a diagonal, or only implied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.tensor import DType, Spec
from sdformats.views import PATTERNS, Ref, View

if TYPE_CHECKING:
    from sdformats.views import Load

_ONE = {
    DType.F8_E4M3: 0x38,
    DType.F8_E5M2: 0x3C,
    DType.F16: 0x3C00,
    DType.BF16: 0x3F80,
    DType.F32: 0x3F800000,
    DType.F64: 0x3FF0000000000000,
}
"""The bit pattern of 1."""


@dataclass(frozen=True)
class Transposed(View):
    """A matrix with rows and columns exchanged."""

    @property
    def spec(self) -> Spec:
        rows, columns = self.of.shape
        return replace(self.of.spec, shape=(columns, rows))

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return self.of.evaluate(load, arrays).T


@dataclass(frozen=True)
class Identity(Ref):
    """The matrix that changes nothing, (size, size)."""

    size: int
    dtype: DType

    @property
    def spec(self) -> Spec:
        return Spec((self.size, self.size), self.dtype)

    def evaluate(self, load: Load, arrays: Any) -> Any:
        if arrays is not np:
            return arrays.eye(self.size)
        return np.eye(self.size, dtype=PATTERNS[self.dtype.bits]) * PATTERNS[self.dtype.bits](_ONE[self.dtype])


@dataclass(frozen=True)
class Repeated(View):
    """A tensor of one number, as a vector of that number."""

    size: int

    @property
    def spec(self) -> Spec:
        return replace(self.of.spec, shape=(self.size,))

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return self.of.evaluate(load, arrays).reshape(1).repeat(self.size)


@dataclass(frozen=True)
class Blocks(Ref):
    """Matrices along the diagonal of a larger one, zeros elsewhere.

    Attributes:
        pieces: the matrices, (rows, columns), or with more axes of size 1 behind.
        rows: how many rows each block has, absent ones included.
        at: which of the rows each piece belongs to.
    """

    pieces: tuple[Ref, ...]
    rows: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        columns = sum(part.shape[1] for part in self.pieces)
        return replace(self.pieces[0].spec, shape=(sum(self.rows), columns, *self.pieces[0].shape[2:]))

    @property
    def parts(self) -> tuple[Ref, ...]:
        return self.pieces

    def evaluate(self, load: Load, arrays: Any) -> Any:
        made = [part.evaluate(load, arrays) for part in self.pieces]
        whole = arrays.zeros(self.shape, dtype=made[0].dtype)
        column = 0
        for block, index in zip(made, self.at, strict=True):
            row = sum(self.rows[:index])
            whole[row : row + block.shape[0], column : column + block.shape[1]] = block
            column += block.shape[1]
        return whole
