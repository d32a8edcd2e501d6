"""What native.c does, for tensors in the memory of a CPU: a library in C, where there is one for this machine.

The library is compiled when the package is built (see build.py). Without it torch does everything. A call lets other
threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdkernels.build import library

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdkernels.linear import Term

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MATRIX = struct.Struct("@Pqq")  # address, elements from row to row, type
_WEIGHT = struct.Struct("@d")
_SUM = struct.Struct("@PN")
_FINITE = struct.Struct("@q")
_PART = struct.Struct("@qqPN")
_INSIDE = struct.Struct("@qqqqPNN")
_MODEL = struct.Struct("@dd")
_ELECTION = struct.Struct("@PNdqq")
_NONE = _MATRIX.pack(0, 0, 0)
_MOST_MODELS = 16


class Library:
    """A library that `sdkernels.build` made.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        data, size = ctypes.c_void_p, ctypes.c_size_t
        self.combine = functions.sdkernels_combine
        self.combine.argtypes = (data, size, ctypes.c_char_p, size, size, size)
        self.finite = functions.sdkernels_finite
        self.finite.argtypes = (data, size, ctypes.c_int64)
        packed, choice = ctypes.c_char_p, ctypes.c_int
        self.inside = functions.sdkernels_inside
        self.inside.argtypes = (packed, size, ctypes.c_int32, ctypes.c_int32, data)
        self.elect = functions.sdkernels_elect
        self.elect.argtypes = (packed, size)
        self.panel = functions.sdkernels_panel
        self.panel.argtypes, self.panel.restype = (choice, choice), size
        self.pack_up = functions.sdkernels_pack_up
        self.pack_up.argtypes = (packed, size, size, ctypes.c_double, data, size, size, choice)
        self.pack_down = functions.sdkernels_pack_down
        self.pack_down.argtypes = (packed, size, size, data, size, size, choice)
        self.add_product = functions.sdkernels_add_product
        self.add_product.argtypes = (packed, size, size, packed, packed, choice)


def _load() -> Library | None:
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        return None
    try:
        return Library(library())
    except OSError:
        return None


LIBRARY = _load()
"""None where there is none for this machine."""


def serves(dtype: torch.dtype) -> bool:
    """Whether there is a library, and it knows this type."""
    return LIBRARY is not None and dtype in _TYPES


@dataclass(frozen=True, slots=True)
class FilePart:
    """Elements of a file, read into memory a row at a time.

    Attributes:
        descriptor: the open file.
        offset: its first byte that is read.
        row: memory for one row, which a matrix with rows 0 elements apart stands for.
    """

    descriptor: int
    offset: int
    row: Tensor


class Sums:
    """Several sums, made together as often as is asked for, of what the tensors' memory holds then.

    Args:
        library: see `LIBRARY`.
        sums: the terms of each, as for `linear.reference`, and where it goes: matrices of one shape.
        columns: the elements of a row.
    """

    def __init__(self, library: Library, sums: Sequence[tuple[Sequence[Term], Tensor]], columns: int) -> None:
        self._combine, self._columns, self._many = library.combine, columns, len(sums)
        self._held: list[object] = [sums]
        packed = b""
        for terms, out in sums:
            data = b"".join(_WEIGHT.pack(w) + matrix(x) + (matrix(y[0]) if y else _NONE) for w, x, *y in terms)
            self._held.append(memory := ctypes.create_string_buffer(data, len(data)))
            packed += _SUM.pack(ctypes.addressof(memory), len(terms)) + matrix(out) + _FINITE.pack(0)
        self._sums = ctypes.create_string_buffer(packed, len(packed))

    def __call__(self, count: int, parts: Sequence[FilePart] = ()) -> list[bool] | None:
        """Make the first `count` elements of each sum, row after row.

        Args:
            count: how many.
            parts: what is read from files meanwhile.

        Returns:
            Whether each is finite; None where a file could not be read.
        """
        places = b"".join(
            _PART.pack(part.descriptor, part.offset, part.row.data_ptr(), part.row.nbytes) for part in parts
        )
        if not self._combine(self._sums, self._many, places, len(parts), count, self._columns):
            return None
        step = len(self._sums) // self._many
        return [bool(_FINITE.unpack_from(self._sums, (i + 1) * step - _FINITE.size)[0]) for i in range(self._many)]


def sums(wanted: Sequence[tuple[Sequence[Term], Tensor]]) -> Sums | None:
    """Return what does as `linear.reference` for each of `wanted`: terms, and the tensor that their sum goes to.

    None where there is no library for these tensors: others than float16, bfloat16 and float32 on a CPU, of one shape,
    without gaps (or matrices with rows apart, or all in one place, alone).
    """
    shape = _rows_and_columns([x for terms, out in wanted for x in (out, *(x for _, *xs in terms for x in xs))])
    if LIBRARY is None or shape is None:
        return None
    return Sums(LIBRARY, wanted, shape[1])


def combine_into(terms: Sequence[Term], out: Tensor) -> bool | None:
    """Do as `linear.reference`, and return whether all of `out` is finite; None as for `sums`."""
    made = sums([(terms, out)])
    found = made(out.numel()) if made is not None else None
    return None if found is None else found[0]


def finite(x: Tensor) -> bool | None:
    """Whether no element is NaN or infinite; None where there is no library for this tensor."""
    if LIBRARY is None or x.dtype not in _TYPES or not x.is_cpu or not x.is_contiguous():
        return None
    return bool(LIBRARY.finite(x.data_ptr(), x.numel(), _TYPES[x.dtype]))


class Inside(NamedTuple):
    """How many magnitudes are above a bound, or from it on, for two of them; and those strictly between, as bits."""

    above_low: int
    from_low: int
    above_high: int
    from_high: int
    between: Tensor


def inside(x: Tensor, base: Tensor | None, low: int, high: int, room: int) -> Inside | None:
    """Compare |x|, or |x − base|, in float32, with two bounds.

    Args:
        x, base: of one shape.
        low, high: the bounds, as bits.
        room: how many may lie between them.

    Returns:
        None where there are more, and where there is no library for these tensors.
    """
    tensors = [x] if base is None else [x, base]
    if LIBRARY is None or not _without_gaps(tensors):
        return None
    between = torch.empty(room, dtype=torch.int32)
    of = _WEIGHT.pack(1) + matrix(x.reshape(-1)) + (_NONE if base is None else matrix(base.reshape(-1)))
    found = ctypes.create_string_buffer(_INSIDE.pack(0, 0, 0, 0, between.data_ptr(), room, 0), _INSIDE.size)
    if not LIBRARY.inside(of, x.numel(), low, high, found):
        return None
    above_low, from_low, above_high, from_high, _, _, kept = _INSIDE.unpack(found)
    return Inside(above_low, from_low, above_high, from_high, between[:kept])


def elect(
    base: Tensor,
    models: Sequence[tuple[Tensor, float, float]],
    out: Tensor,
    *,
    scale: float,
    normalize: bool,
    by_count: bool,
) -> bool:
    """Merge as `ties.reference` does, and return True; False where there is no library for these tensors, or so many models.

    Args:
        models: each with its share, and the largest change that does not count.
    """
    if LIBRARY is None or len(models) > _MOST_MODELS or not _without_gaps([base, out, *(x for x, _, _ in models)]):
        return False
    listed = b"".join(matrix(x.reshape(-1)) + _MODEL.pack(weight, edge) for x, weight, edge in models)
    memory = ctypes.create_string_buffer(listed, len(listed))
    ballot = _ELECTION.pack(ctypes.addressof(memory), len(models), scale, normalize, by_count)
    LIBRARY.elect(matrix(base.reshape(-1)) + matrix(out.reshape(-1)) + ballot, base.numel())
    return True


def _without_gaps(tensors: list[Tensor]) -> bool:
    shape = _rows_and_columns(tensors)
    return shape is not None and shape[0] == 1 and all(x.is_contiguous() for x in tensors)


def _rows_and_columns(tensors: list[Tensor]) -> tuple[int, int] | None:
    """Return the shape that all these tensors have as matrices, one row where none has gaps; None where that is not so."""
    shape, gaps = tensors[0].shape, False
    for x in tensors:
        if x.dtype not in _TYPES or not x.is_cpu or x.shape != shape:
            return None
        gaps = gaps or not x.is_contiguous()
    if not gaps:
        return 1, shape.numel()
    if len(shape) == 2 and all(x.stride(1) == 1 for x in tensors):
        return shape[0], shape[1]
    return None


def matrix(x: Tensor) -> bytes:
    """Return a tensor as the library knows it: where rows begin, and of which type they are."""
    return _MATRIX.pack(x.data_ptr(), x.stride(0) if x.dim() == 2 else 0, _TYPES[x.dtype])
