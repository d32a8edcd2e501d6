"""Whole tensors in memory: how they are read, and the pieces of memory that they are read into."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdmerge.dtypes import TORCH

_ALIGNMENT = 64
"""Bytes that pieces of memory begin at multiples of: a line of the cache, and the longest vector."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdmerge.step import Read

    Memory = Callable[[int], Tensor]
    """Returns so many bytes, for as long as a tensor is worked on."""


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable, as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def whole(read: Read, buffer: Tensor) -> Tensor:
    """Return one tensor as stored, in the memory of `buffer` (bytes); in float32, times its factor, where it has one."""
    values = _stored(read, read.key, buffer).reshape(read.spec.shape)
    if read.scale is None:
        return values
    return scaled(
        values, _stored(read, read.scale, torch.empty(read.source.specs[read.scale].nbytes, dtype=torch.uint8))
    )


def part_of(read: Read, start: int, shape: tuple[int, ...], buffer: Tensor) -> Tensor:
    """Return some elements of a tensor as stored, from element `start` on, in the memory of `buffer` (bytes)."""
    dtype = TORCH[read.spec.dtype]
    part = buffer[: math.prod(shape) * dtype.itemsize]
    read.source.read_into(read.key, start * dtype.itemsize, as_bytes(part))
    return part.view(dtype).view(shape)


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """Return fp8 values times their factor, or one for each row, in float32."""
    values, factor = values.float(), factor.float()
    return values * (factor if factor.numel() == 1 else factor.reshape(-1, *[1] * (values.dim() - 1)))


def _stored(read: Read, key: str, buffer: Tensor) -> Tensor:
    spec = read.source.specs[key]
    window = buffer[: spec.nbytes]
    if spec.nbytes:
        read.source.read_into(key, 0, as_bytes(window))
    return window.view(TORCH[spec.dtype])


def fresh(nbytes: int) -> Tensor:
    """Return new memory of so many bytes."""
    return torch.empty(nbytes, dtype=torch.uint8)


class Pool:
    """Memory for whole tensors, used again by all threads: a large piece from the system is cleared page by page first.

    What is done with a tensor takes one slab, and gets all its pieces from it, one after the other.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        """Slabs in order of size."""
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, expected: int) -> Iterator[Memory]:
        """Yield a function that gives out pieces, `expected` bytes in all or some more, which come back in the end."""
        slab, used = self._take(expected), 0

        def memory(nbytes: int) -> Tensor:
            nonlocal used
            start, used = used, used + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            return slab[start : start + nbytes] if used <= slab.numel() else fresh(nbytes)

        yield memory
        if used > slab.numel():
            slab = fresh(used)  # the next tensor of this size finds enough
        with self._lock:  # not after an error: what it interrupted may be in use still
            insort(self._free, slab, key=Tensor.numel)

    def _take(self, expected: int) -> Tensor:
        """Return the smallest slab that is large enough; a new one takes the place of the largest where none is."""
        with self._lock:
            fits = bisect_left(self._free, expected, key=Tensor.numel)
            if fits < len(self._free):
                return self._free.pop(fits)
            del self._free[-1:]
        return fresh(expected)
