"""Whole tensors in memory: how they are read, and the pieces of memory that they are read into."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdmerge.dtypes import TORCH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdmerge.step import Read


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


class Pool:
    """Memory for whole tensors, used again by all threads: a large piece from the system is cleared page by page first."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Tensor:
        """Return at least `nbytes` bytes: the smallest free piece that holds them, or a new one."""
        with self._lock:
            fits = [piece for piece in self._free if piece.numel() >= nbytes]
            if fits:
                best = min(fits, key=Tensor.numel)
                self._free = [piece for piece in self._free if piece is not best]
                return best
            if self._free:  # one that is too small makes way
                del self._free[0]
        return torch.empty(nbytes, dtype=torch.uint8)

    def give(self, pieces: Iterable[Tensor]) -> None:
        """Take pieces back."""
        with self._lock:
            self._free = sorted([*self._free, *pieces], key=Tensor.numel)
