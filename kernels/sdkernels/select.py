"""The k-th largest magnitude of a tensor, or of the difference of two, exactly and without a sort.

Magnitudes of one floating type are in the order of their bits, read as integers: both versions count and compare integers,
so that a NaN has a place too, above infinity.

The reference draws a bracket from a sample that is always the same, counts what lies outside of it chunk by chunk, and
partially sorts the few values inside. Only values strictly between the bracket's ends are collected: the ends are sampled
values, so a value that thousands of elements share becomes an end and is merely counted. Where the bracket misses (a
few in ten million calls on random values) the digits are counted instead, as the Triton version always does.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdkernels import native
from sdkernels.cast import accumulator
from sdkernels.kernel import Case, Kernel, tl, triton

_CHUNK = 1 << 17
_ALL = 1 << 15  # up to here, sorting everything partially costs less than a sample
_DIGIT = 16
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def reference(x: Tensor, k: int, base: Tensor | None = None) -> Tensor:
    """Return the `k`-th largest |x|, or |x − base|.

    Both are widened to float32 first (float64 where one of them is), where differences of fp16 values are exact. Elements
    equal to the result count as often as they occur: at least `k` magnitudes are >= the result, more where there are
    ties. NaN counts as larger than infinity, so the result is NaN where `k` elements or more are NaN. The memory needed
    beside the inputs is a few chunks and a few percent of the elements. Tensors on another device than the CPU are
    brought there chunk by chunk.

    Args:
        x: at least one element, any shape, any floating type.
        k: 1 (the largest) to the number of elements (the smallest).
        base: of the shape of `x`, any floating type.

    Returns:
        A 0-d tensor on the device of `x`, float32 (float64 where an input is float64).

    Raises:
        ValueError: `k` is out of range (so an empty tensor has no valid k), or the shapes differ.
    """
    _check(x, k, base)
    values = _Magnitudes(x, base)
    low, high = values.bracket(k)
    found = values.inside(low, high, k)
    if found is None:
        found = values.by_digits(k)
    bits = torch.tensor(found, dtype=_BITS[values.dtype.itemsize])
    return bits.view(values.dtype).to(x.device)


def _check(x: Tensor, k: int, base: Tensor | None) -> None:
    if base is not None and base.shape != x.shape:
        raise ValueError(f"base has shape {tuple(base.shape)}, expected {tuple(x.shape)}, that of x")
    if not 1 <= k <= x.numel():
        raise ValueError(f"k is {k}, expected 1 to {x.numel()}, the number of elements")


class _Magnitudes:
    """The magnitudes' bits as integers, made chunk by chunk in buffers that are used again, or in native code."""

    def __init__(self, x: Tensor, base: Tensor | None) -> None:
        self._tensors = [t.detach().reshape(-1) for t in (x, base) if t is not None]
        self.dtype = accumulator(*[t.dtype for t in self._tensors])
        self.count = x.numel()
        self.top = int(torch.iinfo(_BITS[self.dtype.itemsize]).max)
        self._buffers = torch.empty((len(self._tensors), min(self.count, _CHUNK)), dtype=self.dtype)

    def _bits(self, parts: list[Tensor]) -> NDArray[Any]:
        """The magnitudes of `parts` (x and, if there is one, base), in the first buffer."""
        count = parts[0].numel()
        value = self._buffers[0, :count].copy_(parts[0])
        if len(parts) == 2:
            value.sub_(self._buffers[1, :count].copy_(parts[1]))
        found: NDArray[Any] = value.view(_BITS[self.dtype.itemsize]).bitwise_and_(self.top).numpy()
        return found

    def chunks(self) -> Iterator[NDArray[Any]]:
        """All magnitudes; each array is overwritten by the next."""
        for start in range(0, self.count, _CHUNK):
            yield self._bits([t[start : start + _CHUNK] for t in self._tensors])

    def bracket(self, k: int) -> tuple[int, int]:
        """Two values that the k-th largest is very probably between, or equal to.

        One element is drawn from each of `size` equal stretches, its place in the stretch following the golden ratio: no
        random numbers, and no period that rows or channels could share. The k-th largest is missed if more than five
        standard deviations of a binomial count separate it from its expected rank.
        """
        if self.count <= _ALL:
            return -1, self.top
        size = min(_CHUNK // 2, self.count // 32)
        place = np.arange(size, dtype=np.float64)
        place += place * 0.6180339887498949 % 1.0
        at = torch.from_numpy((place * (self.count / size)).astype(np.int64).clip(max=self.count - 1))
        drawn = np.sort(self._bits([_take(t, at) for t in self._tensors]))
        rank = k / self.count
        margin = 5 * (size * rank * (1 - rank)) ** 0.5 + 5
        first = int(size * (1 - rank) - margin)
        last = int(size * (1 - rank) + margin) + 1
        return (int(drawn[first]) if first >= 0 else -1), (int(drawn[last]) if last < size else self.top)

    def inside(self, low: int, high: int, k: int) -> int | None:
        """The k-th largest if it is one of `low` to `high`, else None."""
        found = self._in_one_pass(low, high) or self._by_chunks(low, high)
        if found.above_high < k <= found.from_high:
            return high
        if found.from_high < k <= found.above_low:
            return _largest(found.between.numpy(), k - found.from_high)
        return low if found.above_low < k <= found.from_low else None

    def _in_one_pass(self, low: int, high: int) -> native.Inside | None:
        room = self.count if self.count <= _ALL else self.count // 4  # a bracket of a sample holds far fewer
        x, *base = self._tensors
        return native.inside(x, base[0] if base else None, low, high, room) if self.dtype == torch.float32 else None

    def _by_chunks(self, low: int, high: int) -> native.Inside:
        above_low = from_low = above_high = from_high = 0
        between = []
        mask, other = np.empty((2, self._buffers.shape[1]), dtype=np.bool_)
        for bits in self.chunks():
            one, two = mask[: bits.size], other[: bits.size]
            above_high += int(np.count_nonzero(np.greater(bits, high, out=one)))
            from_low += int(np.count_nonzero(np.greater_equal(bits, low, out=one)))
            from_high += int(np.count_nonzero(np.greater_equal(bits, high, out=one)))
            above_low += int(np.count_nonzero(np.greater(bits, low, out=two)))
            between.append(bits[np.greater(two, one, out=two)])
        kept = torch.from_numpy(np.concatenate(between))
        return native.Inside(above_low, from_low, above_high, from_high, kept)

    def by_digits(self, k: int) -> int:
        """The k-th largest by counting digits of 16 bits, the highest first: slower, never wrong."""
        found = 0
        for shift in range(8 * self.dtype.itemsize - _DIGIT, -1, -_DIGIT):
            counts = np.zeros(1 << _DIGIT, dtype=np.int64)
            for bits in self.chunks():
                alike = bits[bits >> shift >> _DIGIT == found]
                counts += np.bincount(alike >> shift & ((1 << _DIGIT) - 1), minlength=counts.size)
            from_digit = counts[::-1].cumsum()[::-1]
            digit = int(np.count_nonzero(from_digit >= k)) - 1
            k -= int(from_digit[digit] - counts[digit])
            found = found << _DIGIT | digit
        return found


def _take(flat: Tensor, at: Tensor) -> Tensor:
    """Elements of a flat tensor, as integers on the way: not every fp8 type can be indexed."""
    bits = flat.view(_BITS[flat.dtype.itemsize])
    return bits.index_select(0, at.to(flat.device)).view(flat.dtype)


def _largest(values: NDArray[Any], k: int) -> int:
    return int(np.partition(values, values.size - k)[values.size - k])


_BLOCK = 4096
_BLOCKS = 8  # blocks a program counts before it adds to the shared counts
_FAST_DIGIT = 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _digits_kernel(  # type: ignore[no-untyped-def]
    counts, found, x, base, count,
    SHIFT: tl.constexpr, FIRST: tl.constexpr, PAIRED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    mine = tl.zeros((256,), dtype=tl.int32)
    for block in range(BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if PAIRED:
            value = value - tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if not FIRST:
            inside = inside & ((bits >> (SHIFT + 8)) == tl.load(found))
        mine += tl.histogram((bits >> SHIFT) & 255, 256, mask=inside)
    tl.atomic_add(counts + tl.arange(0, 256), mine.to(tl.int64), mask=mine > 0)


def fast(x: Tensor, k: int, base: Tensor | None = None) -> Tensor:
    """Do what `reference` does: four passes, each counting eight more bits of the elements that are still alike.

    Counts are integers, so their order does not matter, and they stay on the device: nothing waits for it. fp8 is widened
    by torch before, as in `linear`; float64 goes to the reference.
    """
    _check(x, k, base)
    if torch.float64 in (x.dtype, None if base is None else base.dtype):
        return reference(x, k, base)
    one, two = (t.float() if t.dtype.itemsize == 1 else t for t in (x, x if base is None else base))
    one, two = one.detach().contiguous(), two.detach().contiguous()
    found = torch.zeros(1, dtype=torch.int32, device=x.device)
    rank = torch.full((1,), k, dtype=torch.int64, device=x.device)
    grid = (triton.cdiv(x.numel(), _BLOCK * _BLOCKS),)
    for shift in range(32 - _FAST_DIGIT, -1, -_FAST_DIGIT):
        counts = torch.zeros(1 << _FAST_DIGIT, dtype=torch.int64, device=x.device)
        _digits_kernel[grid](
            counts, found, one, two, x.numel(),
            SHIFT=shift, FIRST=shift == 32 - _FAST_DIGIT, PAIRED=base is not None, BLOCKS=_BLOCKS, BLOCK=_BLOCK,
        )  # fmt: skip
        from_digit = counts.flip(0).cumsum(0).flip(0)
        digit = (from_digit >= rank).sum(0, keepdim=True) - 1
        rank = rank - (from_digit - counts).index_select(0, digit)
        found = (found << _FAST_DIGIT) | digit.to(torch.int32)
    return found.view(torch.float32).reshape(())


def cases() -> Iterable[Case]:
    """Sizes around the blocks, every input type, first, middle and last k, with and without a base, and ties."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        for count, k, paired in ((1, 1, False), (4097, 819, True), (2050, 1, False), (40_000, 40_000, True)):
            name = f"{str(dtype).removeprefix('torch.')}-{count}-{k}{'-base' if paired else ''}"
            yield Case(name, partial(_make, dtype, count, k, paired), count * dtype.itemsize * (2 if paired else 1))
    yield Case("zeros", lambda device: (torch.zeros(5000, device=device), 1000), 20_000)


def _make(dtype: torch.dtype, count: int, k: int, paired: bool, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(count)
    x, base = (torch.randn((2, count), generator=source) * 0.1).to(dtype).to(device)
    return (x, k, base) if paired else (x, k)


kth_magnitude = Kernel("select.kth_magnitude", reference, fast, cases)
