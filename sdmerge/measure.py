"""The arithmetic of `sdmerge.comparison`: pairs of tensors in, sums out.

Both files are read once, block by block, into reused buffers. Borders are fixed and partial sums are added up with
`math.fsum`, which rounds once whatever the order, so the numbers are the same for any number of threads.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdmerge.dtypes import TORCH
from sdmerge.policy import COMPUTABLE
from sdmerge.team import in_threads
from sdmerge.whole import as_bytes
from sdmerge.worker import BLOCK, WIDEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdmerge.step import Read

    Pair = tuple[Read, Read]


@dataclass(frozen=True, slots=True)
class Measures:
    """What comparing some elements gave.

    Attributes:
        elements: how many were compared. Types narrower than a byte are counted in bytes.
        changed: those whose bits differ; in tensors of two types, or scaled ones, those whose values differ.
        measured: those that the sums are over: floating ones that are finite in both.
        nonfinite: floating ones that are NaN or infinite in A or B.
        aa, bb, ab, dd: the sums of A², B², A·B and (A - B)², in float64.
    """

    elements: int = 0
    changed: int = 0
    measured: int = 0
    nonfinite: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0

    @property
    def distance(self) -> float | None:
        """‖A - B‖ / ‖A‖; infinite where only A is zero; None where nothing was measured, or squares are beyond float64."""
        if not self.measured or not math.isfinite(self.aa + self.dd):
            return None
        if self.dd == 0:
            return 0.0
        return math.inf if self.aa == 0 else math.sqrt(self.dd) / math.sqrt(self.aa)

    @property
    def cosine(self) -> float | None:
        """A·B / (‖A‖ ‖B‖); None where nothing was measured, A or B is zero, or squares are beyond float64."""
        if not self.measured or not math.isfinite(self.aa + self.bb) or not self.aa or not self.bb:
            return None
        if self.dd == 0:
            return 1.0
        return max(-1.0, min(1.0, self.ab / (math.sqrt(self.aa) * math.sqrt(self.bb))))

    @classmethod
    def of(cls, parts: Sequence[Measures]) -> Measures:
        """Add up, in a way that does not depend on the order."""
        counts = (sum(getattr(one, name) for one in parts) for name in ("elements", "changed", "measured", "nonfinite"))
        sums = (_total([getattr(one, name) for one in parts]) for name in ("aa", "bb", "ab", "dd"))
        return cls(*counts, *sums)


def compare(pairs: Sequence[Pair], threads: int | None, progress: Callable[[int], None]) -> list[Measures]:
    """Measure pairs of tensors of one shape.

    Args:
        pairs: of one type, or of two that torch knows.
        threads: how many; None takes the processor's cores, 8 at most.
        progress: called from this thread with the number of bytes read since the last call.

    Returns:
        One for each pair.

    Raises:
        FormatError: a file cannot be read.
    """
    parts: list[list[Measures]] = [[] for _ in pairs]
    in_threads(
        _blocks(pairs), lambda: nullcontext(_Worker(parts).do), threads=threads, name="sdmerge-diff", progress=progress
    )
    return [Measures.of(found) for found in parts]


class _Side:
    """One file's memory for a block, in raw bytes and in float64."""

    def __init__(self) -> None:
        self.raw = torch.empty(BLOCK * WIDEST, dtype=torch.uint8)
        self.bytes = as_bytes(self.raw)
        self.wide = torch.empty(BLOCK, dtype=torch.float64)
        self._single = torch.empty(BLOCK, dtype=torch.float32)
        self._read: Read | None = None
        self._factor: Tensor | None = None

    def load(self, read: Read, start: int, count: int) -> int:
        """Read a block; return its bytes."""
        bits = read.spec.dtype.bits
        first, last = start * bits // 8, (start + count) * bits // 8
        read.source.read_into(read.key, first, self.bytes[: last - first])
        return last - first

    def widen(self, read: Read, start: int, count: int) -> Tensor:
        """Return the block's values in float64, times its factors where it has them."""
        dtype = TORCH[read.spec.dtype]
        stored = self.raw[: count * dtype.itemsize].view(dtype)
        wide = self.wide[:count]
        # two steps are twice as fast as one from float16, and exact
        wide.copy_(self._single[:count].copy_(stored) if dtype == torch.float16 else stored)
        if read.scale is not None:
            factor = self._factor_of(read)
            if factor.numel() > 1:
                rows = torch.arange(start, start + count) // math.prod(read.spec.shape[1:])
                factor = factor[rows]
            wide.mul_(factor)
        return wide

    def _factor_of(self, read: Read) -> Tensor:
        """Return an fp8 tensor's factor or factors, read once."""
        if self._factor is None or self._read is not read:
            assert read.scale is not None, "only asked for where there is one"
            dtype = TORCH[read.source.specs[read.scale].dtype]
            self._factor = torch.frombuffer(read.source.read(read.scale), dtype=dtype).double()
            self._read = read
        return self._factor


class _Worker:
    """A thread's own buffers, and what it does with a block."""

    def __init__(self, parts: Sequence[list[Measures]]) -> None:
        self._parts = parts
        self._a, self._b = _Side(), _Side()
        self._unlike = np.empty(BLOCK * WIDEST, dtype=np.bool_)

    def do(self, index: int, pair: Pair, start: int, count: int) -> int:
        """Read and measure one block of the `index`-th pair; return the bytes read."""
        measures, nbytes = self._measure(pair, start, count)
        self._parts[index].append(measures)  # several threads may: appending needs no lock
        return nbytes

    def _measure(self, pair: Pair, start: int, count: int) -> tuple[Measures, int]:
        a, b = pair
        nbytes = self._a.load(a, start, count)
        moved = nbytes + self._b.load(b, start, count)
        by_bits = a.spec.dtype == b.spec.dtype and a.scale is None and b.scale is None
        changed = self._changed_bits(a.spec.dtype.itemsize, nbytes) if by_bits else 0
        if by_bits and a.spec.dtype not in COMPUTABLE:
            return Measures(nbytes // (a.spec.dtype.itemsize or 1), changed), moved
        x = self._a.widen(a, start, count)
        if by_bits and not changed:
            return _sums_of_one(x), moved
        y = self._b.widen(b, start, count)
        if not by_bits:
            changed = int(((x != y) & ~(x.isnan() & y.isnan())).sum().item())
        if not {a.spec.dtype, b.spec.dtype} <= COMPUTABLE:
            return Measures(count, changed), moved
        return _sums(x, y, changed), moved

    def _changed_bits(self, itemsize: int, nbytes: int) -> int:
        """Count the elements of one type that differ in any bit; bytes where elements are narrower."""
        dtype = np.dtype(f"u{itemsize or 1}")
        a, b = (np.frombuffer(side.bytes[:nbytes], dtype=dtype) for side in (self._a, self._b))
        unlike = np.not_equal(a, b, out=self._unlike[: a.size])
        return int(np.count_nonzero(unlike))


def _sums_of_one(x: Tensor) -> Measures:
    """Measure a block that is the same on both sides."""
    count = x.numel()
    bad = 0
    square = torch.dot(x, x).item()
    if not math.isfinite(square) and (bad := int((~x.isfinite()).sum().item())):
        x = torch.where(x.isfinite(), x, 0.0)
        square = torch.dot(x, x).item()
    return Measures(count, 0, count - bad, bad, square, square, square, 0.0)


def _sums(x: Tensor, y: Tensor, changed: int) -> Measures:
    """Measure a block. `y` is overwritten: a difference taken first is exact where the sides are near each other."""
    count, bad = x.numel(), 0
    aa, bb = torch.dot(x, x).item(), torch.dot(y, y).item()
    if not math.isfinite(aa + bb):
        fine = x.isfinite() & y.isfinite()
        bad = count - int(fine.sum().item())
        x, y = torch.where(fine, x, 0.0), torch.where(fine, y, 0.0)
        aa, bb = torch.dot(x, x).item(), torch.dot(y, y).item()
    ab = torch.dot(x, y).item()
    y.sub_(x)
    return Measures(count, changed, count - bad, bad, aa, bb, ab, torch.dot(y, y).item())


def _total(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan  # beyond float64; the properties say None


def _blocks(pairs: Sequence[Pair]) -> Iterator[tuple[int, Pair, int, int]]:
    for index, pair in enumerate(pairs):
        numel = pair[0].spec.numel
        for start in range(0, numel, BLOCK):
            yield index, pair, start, min(BLOCK, numel - start)
