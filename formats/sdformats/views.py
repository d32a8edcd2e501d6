"""Tensors that are named, cut and put together before any of them is read.

A `Ref` knows its `Spec` at once and its numbers only when asked. Layouts work with a few exact views, which never change a
number; arithmetic is for those who have it: they add nodes of their own. Views are written for what numpy arrays and torch
tensors have in common, so both can be put in. Where a view is bytes of a file in their order, any range of it is read
without the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.errors import CorruptFile, FormatError
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sdformats.tensor import TensorSource

    Load = Callable[["Stored"], Any]
    """Returns a stored tensor as an array: of bit patterns, or of numbers."""

PATTERNS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
"""The types of bit patterns, by their width."""
_MOST_NUMBERS = 16
_BLOCK = 1 << 20


class Ref(ABC):
    """A tensor that has not been read yet."""

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Shape and type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape alone."""
        return self.spec.shape

    @property
    def parts(self) -> tuple[Ref, ...]:
        """What it is made of."""
        return ()

    @abstractmethod
    def evaluate(self, load: Load, arrays: Any) -> Any:
        """Return it as an array.

        Args:
            load: returns a stored tensor.
            arrays: the module that the arrays come from: ``numpy`` or ``torch``.
        """

    @property
    def in_order(self) -> bool:
        """Whether its bytes are bytes of files in their order, so that any range is read without the rest."""
        return False

    def read_range(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable bytes) with its bytes from byte `offset` on; what must be rearranged is read as a whole."""
        data = np.ascontiguousarray(bits(self)).reshape(-1).view(np.uint8).data
        buffer[:] = data[offset : offset + len(buffer)]

    def stored(self) -> Iterator[Stored]:
        """Return every tensor of a file that it is made of, in order, repeated where it is used again."""
        for part in self.parts:
            yield from part.stored()


@dataclass(frozen=True)
class Stored(Ref):
    """A tensor of a file."""

    source: TensorSource
    key: str

    @property
    def spec(self) -> Spec:
        return self.source.specs[self.key]

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return load(self)

    @property
    def in_order(self) -> bool:
        return True

    def read_range(self, offset: int, buffer: memoryview) -> None:
        self.source.read_into(self.key, offset, buffer)

    def stored(self) -> Iterator[Stored]:
        yield self

    def __str__(self) -> str:
        return f"{self.source.path}: {self.key!r}"


@dataclass(frozen=True)
class Constant(Ref):
    """A few numbers that are in no file: an alpha, a shape.

    Attributes:
        values: the numbers, exact in `dtype`.
        dims: the shape; () for a scalar.
    """

    values: tuple[float, ...]
    dtype: DType
    dims: tuple[int, ...] = ()

    @property
    def spec(self) -> Spec:
        return Spec(self.dims, self.dtype)

    def evaluate(self, load: Load, arrays: Any) -> Any:
        """See `Ref`. Numbers, not bit patterns: nothing is cut from them."""
        return arrays.asarray(self.values, dtype=arrays.float64).reshape(self.dims)


@dataclass(frozen=True)
class View(Ref):
    """One tensor, seen otherwise."""

    of: Ref

    @property
    def parts(self) -> tuple[Ref, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Part(View):
    """A range along one axis."""

    axis: int
    start: int
    stop: int

    @property
    def spec(self) -> Spec:
        shape = list(self.of.shape)
        shape[self.axis] = self.stop - self.start
        return replace(self.of.spec, shape=tuple(shape))

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return self.of.evaluate(load, arrays)[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    @property
    def in_order(self) -> bool:
        return self.axis == 0 and self.of.in_order

    def read_range(self, offset: int, buffer: memoryview) -> None:
        """See `Ref`. Rows lie together."""
        if self.axis:
            super().read_range(offset, buffer)
        else:
            self.of.read_range(self.start * _row_bytes(self.of) + offset, buffer)


@dataclass(frozen=True)
class Shaped(View):
    """The same numbers in another shape."""

    dims: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        return replace(self.of.spec, shape=self.dims)

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return self.of.evaluate(load, arrays).reshape(self.dims)

    @property
    def in_order(self) -> bool:
        return self.of.in_order

    def read_range(self, offset: int, buffer: memoryview) -> None:
        self.of.read_range(offset, buffer)


@dataclass(frozen=True)
class Joined(Ref):
    """Several tensors of one type, one after the other along an axis."""

    pieces: tuple[Ref, ...]
    axis: int = 0

    @property
    def spec(self) -> Spec:
        shape = list(self.pieces[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.pieces)
        return replace(self.pieces[0].spec, shape=tuple(shape))

    @property
    def parts(self) -> tuple[Ref, ...]:
        return self.pieces

    def evaluate(self, load: Load, arrays: Any) -> Any:
        return arrays.concatenate([part.evaluate(load, arrays) for part in self.pieces], self.axis)

    @property
    def in_order(self) -> bool:
        return self.axis == 0 and all(piece.in_order for piece in self.pieces)

    def read_range(self, offset: int, buffer: memoryview) -> None:
        """See `Ref`. Rows of one piece lie behind those of another."""
        if self.axis:
            super().read_range(offset, buffer)
            return
        start, stop = 0, 0
        for piece in self.pieces:
            start, stop = stop, stop + piece.spec.nbytes
            low, high = max(start, offset), min(stop, offset + len(buffer))
            if low < high:
                piece.read_range(low - start, buffer[low - offset : high - offset])


def _row_bytes(ref: Ref) -> int:
    return ref.spec.nbytes // max(1, ref.shape[0])


def rows(ref: Ref, start: int, stop: int) -> Ref:
    """Return rows `start` to `stop`, or the tensor itself where these are all of them."""
    return ref if (start, stop) == (0, ref.shape[0]) else Part(ref, 0, start, stop)


def reshaped(ref: Ref, shape: tuple[int, ...]) -> Ref:
    """Return a tensor in another shape of as many numbers, or the tensor itself where it has that shape.

    Raises:
        FormatError: that shape has another number of numbers.
    """
    if ref.shape == shape:
        return ref
    if math.prod(shape) != ref.spec.numel:
        raise FormatError(f"{ref.spec} has no shape {list(shape)}", key=str(ref))
    return Shaped(ref, shape)


def joined(parts: Sequence[Ref], axis: int = 0) -> Ref:
    """Return tensors of one type joined; where the parts are all ranges of one tensor in order, that tensor."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Part) and all(isinstance(p, Part) and p.of == first.of and p.axis == axis for p in parts):
        ranges = [(p.start, p.stop) for p in parts if isinstance(p, Part)]
        whole = all(a[1] == b[0] for a, b in pairwise(ranges))
        if whole and ranges[0][0] == 0 and ranges[-1][1] == first.of.shape[axis]:
            return first.of
    return Joined(tuple(parts), axis)


def bits(ref: Ref) -> np.ndarray[Any, Any]:
    """Read a tensor as bit patterns: unsigned integers of its type's width."""
    return np.asarray(ref.evaluate(_patterns, np))


def _patterns(ref: Stored) -> np.ndarray[Any, Any]:
    width = PATTERNS.get(ref.spec.dtype.bits)
    if width is None:
        raise FormatError(f"has the type {ref.spec.dtype}", path=ref.source.path, key=ref.key, expected="whole bytes")
    return np.frombuffer(ref.source.read(ref.key), dtype=width).reshape(ref.shape)


def halves_swapped(ref: Ref) -> Ref:
    """Return a tensor with its second half of rows before the first.

    Raises:
        CorruptFile: its rows have no halves.
    """
    half, odd = divmod(ref.shape[0], 2)
    if odd:
        raise CorruptFile(f"has {ref.shape[0]} rows, which have no halves", key=str(ref))
    return joined([rows(ref, half, 2 * half), rows(ref, 0, half)])


def first_rows(ref: Ref, start: int, count: int) -> np.ndarray[Any, Any]:
    """Read `count` rows from `start` on, as bit patterns; of a stored tensor not a byte more."""
    if not isinstance(ref, Stored) or ref.spec.dtype.bits not in PATTERNS:
        return np.asarray(bits(ref)[start : start + count])
    row = _row_bytes(ref)
    data = bytearray(row * count)
    ref.source.read_into(ref.key, row * start, memoryview(data))
    return np.frombuffer(data, dtype=PATTERNS[ref.spec.dtype.bits]).reshape(count, *ref.shape[1:])


def same(one: Ref, other: Ref) -> bool:
    """Whether two tensors are equal bit by bit. Reads no more of them than it takes to see that they differ.

    What lies in a file in order is compared in blocks, so that little memory is enough for any size.
    """
    if one == other:
        return True
    if one.spec != other.spec:
        return False
    if not (one.in_order and other.in_order):
        return bool(np.array_equal(bits(one), bits(other)))
    block = min(_BLOCK, one.spec.nbytes)
    mine, theirs = memoryview(bytearray(block)), memoryview(bytearray(block))
    for start in range(0, one.spec.nbytes, _BLOCK):
        size = min(_BLOCK, one.spec.nbytes - start)
        one.read_range(start, mine[:size])
        other.read_range(start, theirs[:size])
        if mine[:size] != theirs[:size]:
            return False
    return True


def numbers(ref: Ref) -> list[float]:
    """Read a small tensor: an alpha, a scale, a shape.

    Raises:
        CorruptFile: it is no small tensor of numbers.
    """
    if isinstance(ref, Constant):
        return list(ref.values)
    if ref.spec.numel > _MOST_NUMBERS or ref.spec.dtype not in _READERS:
        where = next(ref.stored())
        raise CorruptFile(f"is {ref.spec}", path=where.source.path, key=where.key, expected="one number")
    return [float(value) for value in _READERS[ref.spec.dtype](bits(ref).reshape(-1))]


def floats(ref: Ref) -> np.ndarray[Any, Any]:
    """Read a tensor of floating-point numbers.

    Raises:
        FormatError: its type is none that numpy and bit shifts can tell: an fp8.
    """
    if ref.spec.dtype not in _READERS:
        raise FormatError(
            f"is {ref.spec}", key=str(next(ref.stored(), None)), expected="float16, bfloat16, float32 or float64"
        )
    return np.asarray(_READERS[ref.spec.dtype](bits(ref)))


def number(ref: Ref) -> float:
    """Read a tensor of one number; errors as `numbers`."""
    found = numbers(ref)
    if len(found) != 1:
        where = next(ref.stored())
        raise CorruptFile(f"is {ref.spec}", path=where.source.path, key=where.key, expected="one number")
    return found[0]


_READERS: Mapping[DType, Callable[[Any], Any]] = {
    DType.F16: lambda raw: raw.view(np.float16),
    DType.BF16: lambda raw: (raw.astype(np.uint32) << 16).view(np.float32),
    DType.F32: lambda raw: raw.view(np.float32),
    DType.F64: lambda raw: raw.view(np.float64),
    DType.I32: lambda raw: raw.view(np.int32),
    DType.I64: lambda raw: raw.view(np.int64),
    DType.U8: lambda raw: raw,
    DType.BOOL: lambda raw: raw,
}


def constant(value: float, dtype: DType) -> Constant:
    """Return a scalar in the type of the tensors beside it where that holds the number exactly, else in F32."""
    wanted: dict[DType, Any] = {DType.F16: np.float16, DType.F32: np.float32}
    with np.errstate(over="ignore"):
        if dtype in wanted and float(wanted[dtype](value)) == value:
            return Constant((value,), dtype)
        if dtype is DType.BF16 and not np.float32(value).view(np.uint32) & 0xFFFF and np.float32(value) == value:
            return Constant((value,), dtype)
    return Constant((value,), DType.F32)
