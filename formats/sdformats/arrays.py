"""numpy arrays, element types and scalars inside a pickle, read without letting numpy unpickle them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.pickle_names import NUMPY_TYPES
from sdformats.place import Mismatch
from sdformats.records import MemoryRecord, Span
from sdformats.strided import TensorRef, contiguous_strides, view, whole_tuple
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from sdformats.place import Place

_LARGEST_SCALAR = 4096


@dataclass(eq=False, slots=True)
class ArrayType:
    """An element type: numpy's code for it, and the order of its bytes."""

    code: str
    big_endian: bool = False

    @property
    def dtype(self) -> DType | None:
        """The type under our name, or None if tensors cannot have it (objects, text, records, dates)."""
        return NUMPY_TYPES.get(self.code)

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> ArrayType:
        """Make it from the arguments of ``numpy.dtype``.

        Raises:
            Mismatch: they are no such arguments.
        """
        if not arguments or not isinstance(arguments[0], str):
            raise Mismatch
        return cls(arguments[0].lstrip("<|=>"), arguments[0].startswith(">"))

    def build(self, state: object) -> None:
        """Take the byte order from the state; the rest of it describes types that no tensor has.

        Raises:
            Mismatch: it is no such state.
        """
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Mismatch
        self.big_endian = state[1] == ">"


@dataclass(eq=False, slots=True)
class Array:
    """An array; it is known only once its state was set. `tensor` stays None where the elements are no numbers."""

    tensor: TensorRef | None = None

    def build(self, state: object, place: Place, position: int) -> None:
        """Take what ``ndarray.__setstate__`` gets: version, shape, type, order, elements.

        Raises:
            Mismatch: it is no such state.
            CorruptFile: there are more or fewer bytes than the shape needs.
        """
        if not isinstance(state, tuple) or len(state) != 5:
            raise Mismatch
        _, shape, kind, columns_first, data = state
        if not isinstance(kind, ArrayType) or type(columns_first) is not bool:
            raise Mismatch
        if kind.dtype is not None:
            self.tensor = _tensor(data, kind, shape, place, position, columns_first=columns_first)


def from_buffer(arguments: tuple[Any, ...], place: Place, position: int) -> Array:
    """Return the array that ``numpy.core.numeric._frombuffer`` would make of (bytes, type, shape, order).

    Raises:
        Mismatch: they are no such arguments.
        CorruptFile: there are more or fewer bytes than the shape needs.
    """
    if len(arguments) != 4 or not isinstance(arguments[1], ArrayType) or arguments[3] not in ("C", "F"):
        raise Mismatch
    data, kind, shape, order = arguments
    if kind.dtype is None:
        return Array()
    return Array(_tensor(data, kind, shape, place, position, columns_first=order == "F"))


def scalar(arguments: tuple[Any, ...]) -> object:
    """Return the number that ``numpy.core.multiarray.scalar`` would make of (type, bytes), or None if it is none.

    Raises:
        Mismatch: they are no such arguments.
    """
    if not 1 <= len(arguments) <= 2 or not isinstance(arguments[0], ArrayType):
        raise Mismatch
    kind = arguments[0]
    if kind.dtype is None:
        return None
    data = arguments[1] if len(arguments) == 2 else bytes(kind.dtype.itemsize)
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise Mismatch
    return np.frombuffer(data, f"{'>' if kind.big_endian else '<'}{kind.code}")[0].item()


def span_of(data: object, position: int) -> Span:
    """Return bytes from a pickle as a span, wherever they are.

    Raises:
        Mismatch: they are no bytes.
    """
    if isinstance(data, Span):
        return data
    if isinstance(data, str):
        # A Python 2 string that happens to be UTF-8 was taken for text.
        data = data.encode("utf-8", "surrogatepass")
    if not isinstance(data, bytes):
        raise Mismatch
    return Span(MemoryRecord(data, position), 0, len(data))


def _tensor(
    data: object, kind: ArrayType, shape: object, place: Place, position: int, *, columns_first: bool
) -> TensorRef:
    assert kind.dtype is not None
    lengths = whole_tuple(shape)
    span = span_of(data, position)
    nbytes = Spec(lengths, kind.dtype).nbytes
    if span.size != nbytes:
        raise place.corrupt(
            f"holds a numpy array of {span.size:,} bytes", f"{nbytes:,} for {kind.code} {list(lengths)}"
        )
    strides = contiguous_strides(lengths, columns_first=columns_first)
    return view(span, kind.dtype, 0, lengths, strides, place, big_endian=kind.big_endian)


def narrowed(tensor: TensorRef, dtype: DType, place: Place) -> TensorRef:
    """Return an array as a tensor of the type that it had on its device.

    numpy has no bfloat16, so such a tensor was stored as float32; the way back is exact.

    Raises:
        UnsupportedFile: the conversion would lose something, or is none that torch does when it saves.
    """
    if tensor.spec.dtype is dtype:
        return tensor
    if tensor.spec.dtype is DType.F32 and dtype is DType.BF16 and not tensor.big_endian:
        wide = np.frombuffer(tensor.span.read(0, tensor.span.size), "<u4")
        if not (wide & 0xFFFF).any():
            raw = (wide >> 16).astype("<u2").tobytes()
            span = Span(MemoryRecord(raw, tensor.span.position), 0, len(raw))
            return TensorRef(span, Spec(tensor.spec.shape, dtype), tensor.strides)
    raise place.unsupported(f"holds a tensor of type {dtype}, stored as {tensor.spec.dtype}", "the same type")
