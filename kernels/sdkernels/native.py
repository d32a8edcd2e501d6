"""What native.c does, for tensors in the memory of a CPU: a library in C, where there is one for this machine.

The library is compiled when the package is built (see build.py). Without it torch does everything. A call lets other
threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels.build import library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sdkernels.linear import Term

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MATRIX = struct.Struct("@Pqq")  # address, elements from row to row, type
_WEIGHT = struct.Struct("@d")
_NONE = _MATRIX.pack(0, 0, 0)


class Library:
    """A library that `sdkernels.build` made.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        data, size = ctypes.c_char_p, ctypes.c_size_t
        self.combine = functions.sdkernels_combine
        self.combine.argtypes = (data, size, data, size, size)
        self.finite = functions.sdkernels_finite
        self.finite.argtypes = (ctypes.c_void_p, size, ctypes.c_int64)


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


def combine_into(terms: Sequence[Term], out: Tensor) -> Callable[[], bool] | None:
    """Return what does as `linear.reference`, with what the tensors' memory holds when it is called, as often as it is.

    It returns whether all of `out` is finite. None where there is no library for these tensors: others than float16,
    bfloat16 and float32 on a CPU, of one shape, without gaps (or matrices with gaps between rows alone).
    """
    tensors = [out]
    for _, *xs in terms:
        tensors += xs
    shape = _rows_and_columns(tensors)
    if LIBRARY is None or shape is None:
        return None
    packed = [_WEIGHT.pack(weight) + _matrix(x) + (_matrix(y[0]) if y else _NONE) for weight, x, *y in terms]
    combine, *arguments = LIBRARY.combine, b"".join(packed), len(packed), _matrix(out), *shape
    return lambda _held=tensors: bool(combine(*arguments))  # type: ignore[misc]


def finite(x: Tensor) -> bool | None:
    """Whether no element is NaN or infinite; None where there is no library for this tensor."""
    if LIBRARY is None or x.dtype not in _TYPES or not x.is_cpu or not x.is_contiguous():
        return None
    return bool(LIBRARY.finite(x.data_ptr(), x.numel(), _TYPES[x.dtype]))


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


def _matrix(x: Tensor) -> bytes:
    return _MATRIX.pack(x.data_ptr(), x.stride(0) if x.dim() == 2 else 0, _TYPES[x.dtype])
