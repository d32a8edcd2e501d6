"""A tensor as a view of a record: where its first element lies, its shape and its strides.

Most tensors lie in the file exactly as they are wanted, and are read from there. The others (transposed, expanded,
conjugated, from a big-endian machine) are gathered into one piece first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.place import Mismatch
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from sdformats.place import Place
    from sdformats.records import Span

_LARGEST = 2**63 - 1
_MAX_RANK = 32
"""Dimensions; what every version of numpy can hold."""
_SPAN = 64 << 20
"""Bytes that a gather reads at once, even where it needs few of them."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor in a record.

    Attributes:
        span: the bytes from the first element that the tensor touches to the last.
        spec: shape and type.
        strides: distance between neighbours along each dimension, in elements.
        big_endian: whether the elements' bytes are in reverse order.
        conjugate: whether the imaginary parts have to change their sign.
        negate: whether all parts have to change their sign.
    """

    span: Span
    spec: Spec
    strides: tuple[int, ...]
    big_endian: bool = False
    conjugate: bool = False
    negate: bool = False

    @property
    def direct(self) -> bool:
        """Whether the span holds exactly the bytes that are wanted."""
        swapped = self.big_endian and self.spec.dtype.itemsize > 1
        return (
            self.span.size == self.spec.nbytes and not (swapped or self.conjugate or self.negate) and self._in_order()
        )

    def _in_order(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if length != 1:
                if stride != expected:
                    return self.spec.numel == 0
                expected *= length
        return True


def view(
    span: Span,
    dtype: DType,
    offset: object,
    shape: object,
    strides: object,
    place: Place,
    *,
    big_endian: bool = False,
    conjugate: bool = False,
    negate: bool = False,
) -> TensorRef:
    """Return the tensor that begins `offset` elements into a span.

    Raises:
        Mismatch: the numbers are no numbers.
        CorruptFile: the tensor reaches beyond the span, or has more elements than fit in any file.
        UnsupportedFile: its type has no sign to flip, or it has too many dimensions.
    """
    begin, lengths, steps = whole(offset), whole_tuple(shape), whole_tuple(strides)
    if len(lengths) != len(steps):
        raise Mismatch
    if len(lengths) > _MAX_RANK:
        raise place.unsupported(f"holds a tensor of {len(lengths)} dimensions", f"at most {_MAX_RANK}")
    spec = Spec(lengths, dtype)
    if max((*lengths, spec.nbytes)) > _LARGEST:
        raise place.corrupt("holds a tensor of more elements than fit in any file")
    if (conjugate or negate) and dtype not in _SIGN:
        raise place.unsupported(f"holds a tensor of type {dtype} that is to be negated", "a floating-point type")
    reach = sum((length - 1) * step for length, step in zip(lengths, steps, strict=True)) + 1 if spec.numel else 0
    begin = begin if reach else 0
    size = dtype.itemsize
    if (begin + reach) * size > span.size:
        raise place.corrupt(f"holds a tensor that reaches to byte {(begin + reach) * size:,} of its storage",
                            f"at most {span.size:,}")  # fmt: skip
    part = span.part(begin * size, reach * size)
    flipped = conjugate and dtype is DType.C64
    return TensorRef(part, spec, steps, big_endian, flipped, negate)


def whole(value: object) -> int:
    """Return a whole number from 0 on, or raise Mismatch."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise Mismatch
    return value


def whole_tuple(value: object) -> tuple[int, ...]:
    """Return a tuple of whole numbers from 0 on, or raise Mismatch."""
    if not isinstance(value, tuple | list) or len(value) > 4 * _MAX_RANK:
        raise Mismatch
    return tuple(whole(item) for item in value)


def contiguous_strides(shape: tuple[int, ...], *, columns_first: bool = False) -> tuple[int, ...]:
    """Return the strides, in elements, of an array without gaps."""
    if columns_first:
        return tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


_SIGN = {DType.F16: 2, DType.BF16: 2, DType.F32: 4, DType.F64: 8, DType.C64: 4}
"""Width in bytes of the number whose top bit is the sign."""
_COMPONENT = {DType.C64: 4}


def gather(ref: TensorRef) -> memoryview:
    """Return all bytes of a tensor in order, little-endian, with its signs applied."""
    spec = ref.spec
    if not spec.numel:
        return memoryview(b"")
    out = np.empty(spec.shape, f"<u{spec.dtype.itemsize}")
    _fill(ref.span, 0, out, ref.strides)
    flat = out.reshape(-1)
    if ref.big_endian:
        flat.view(f"<u{_COMPONENT.get(spec.dtype, spec.dtype.itemsize)}").byteswap(inplace=True)
    if ref.negate or ref.conjugate:
        width = _SIGN[spec.dtype]
        signs = flat.view(f"<u{width}")
        top = np.array(1 << (8 * width - 1), signs.dtype)
        if ref.negate:
            signs ^= top
        if ref.conjugate:
            signs[1::2] ^= top
    return flat.view("u1").data


def _fill(span: Span, start: int, out: np.ndarray[Any, Any], strides: tuple[int, ...]) -> None:
    """Copy a view into `out`; where that would read far more than it needs, one slice after another."""
    reaches = [(length - 1) * stride for length, stride in zip(out.shape, strides, strict=True)]
    size = out.itemsize
    reach = (sum(reaches) + 1) * size
    if reach <= max(_SPAN, 4 * out.nbytes):
        raw = np.frombuffer(span.read(start * size, reach), out.dtype)
        steps = [stride * size for stride in strides]
        out[...] = np.lib.stride_tricks.as_strided(raw, out.shape, steps, writeable=False)
        return
    axis = reaches.index(max(reaches))
    for index in range(out.shape[axis]):
        part = out[(slice(None),) * axis + (slice(index, index + 1),)]
        _fill(span, start + index * strides[axis], part, strides)
