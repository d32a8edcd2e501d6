"""Random numbers that depend on nothing but a seed, a name and the element's index: Philox4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). The generator is a function of a
key (64 bits, here a hash of seed and name) and a counter (128 bits, of which the lower 64 are used) and gives four words
of 32 bits. Element i gets word i % 4 of counter i // 4, so that one run of the rounds serves four elements, and any block
of a tensor can be made alone, on any device, by any thread.

On the CPU the rounds run in numpy, whose integer loops are twice as fast as torch's. Other devices without Triton get
what the CPU made.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdkernels.kernel import Case, Kernel, tl, triton

Key: TypeAlias = tuple[int, int]
"""The generator's key: two words of 32 bits, the low one first."""

Device: TypeAlias = torch.device | str | None
Words: TypeAlias = NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(0xFFFFFFFF00000000)
_HALF = np.uint64(32)
_SPAN = 1 << 16
_BLOCK = 1024


def key(seed: int, name: str) -> Key:
    """Return the key of a stream: the first 64 bits of BLAKE2b over the seed (8 bytes, little-endian) and the name.

    Two streams of 10 million different seeds and names share a key with a probability of 3 in a million. Streams for
    different purposes over one tensor take different names.

    Args:
        seed: 0 to 2^63 - 1.
        name: the tensor's name, any text.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed {seed} is out of range: expected 0 to 2^63 - 1, give another seed")
    text = name.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def rounds(x: Words, y: Words, spare: Words, shifted: Words, key: Key, first: int = 0) -> tuple[Words, Words]:
    """Run the rounds from `first` on over all four arrays, and return the two that hold the result.

    A counter (c0, c1, c2, c3) is held as x = c0 2^32 + c1 and y = c2 2^32 + c3: in this order the 64-bit product of a
    round needs no splitting.
    """
    for i in range(first, _ROUNDS):
        k0, k1 = _round_key(key, i)
        np.right_shift(y, _HALF, out=spare)
        np.multiply(spare, _MULTIPLIERS[1], out=spare)
        np.left_shift(x, _HALF, out=shifted)
        np.bitwise_xor(shifted, k0, out=shifted)
        np.bitwise_xor(spare, shifted, out=spare)
        np.right_shift(x, _HALF, out=x)
        np.multiply(x, _MULTIPLIERS[0], out=x)
        np.left_shift(y, _HALF, out=y)
        np.bitwise_xor(y, k1, out=y)
        np.bitwise_xor(x, y, out=x)
        x, y, spare = spare, x, y
    return x, y


def _round_key(key: Key, i: int) -> tuple[np.uint64, np.uint64]:
    low, high = (((word + i * step) & 0xFFFFFFFF) << 32 for word, step in zip(key, _WEYL, strict=True))
    return np.uint64(low), np.uint64(high)


class Stream:
    """The words of one key, in buffers that are used again and again; for one thread.

    Args:
        key: which stream.
        most: the most words that are taken at once.
    """

    def __init__(self, key: Key, most: int) -> None:
        self._key = key
        counters = (most + 2) // 4 + 1
        self._buffers = np.empty((4, counters), dtype=np.uint64)
        self._words = np.empty((counters, 4), dtype=np.uint32)

    def take(self, start: int, count: int) -> NDArray[np.uint32]:
        """Return the words of elements start to start + count - 1, in a buffer that the next call overwrites."""
        first, skipped = divmod(start, 4)
        size = (skipped + count + 3) // 4
        x, y, spare, shifted = self._buffers[:, :size]
        spare[:] = np.arange(first, first + size, dtype=np.uint64)
        k0, k1 = _round_key(self._key, 0)
        # The first round's other product is zero, since the upper half of the counter is.
        np.bitwise_and(spare, _HIGH, out=x)
        np.bitwise_xor(x, k0, out=x)
        np.bitwise_and(spare, _LOW, out=y)
        np.multiply(y, _MULTIPLIERS[0], out=y)
        np.bitwise_xor(y, k1, out=y)
        x, y = rounds(x, y, spare, shifted, self._key, 1)
        words = self._words[:size]
        for column, half in enumerate((x >> _HALF, x, y >> _HALF, y)):
            words[:, column] = half  # cut to the low 32 bits
        return words.reshape(-1)[skipped : skipped + count]


def uniform_reference(count: int, key: Key, start: int = 0, device: Device = None) -> Tensor:
    """Return uniform numbers: the upper 24 bits of each word, times 2^-24, which is exact.

    Args:
        count: how many.
        key: which stream, from `key`.
        start: the index of the first element, 0 to 2^64 - 1.
        device: where to.

    Returns:
        float32 [count], 0 <= u < 1.
    """
    out = np.empty(count, dtype=np.float32)
    stream = Stream(key, min(count, _SPAN))
    for lo in range(0, count, _SPAN):
        part = out[lo : lo + _SPAN]
        np.multiply((stream.take(start + lo, part.size) >> 8).view(np.int32), np.float32(2.0**-24), out=part)
    return torch.from_numpy(out).to(device or "cpu")


def normal_reference(count: int, key: Key, start: int = 0, device: Device = None) -> Tensor:
    """Return standard normal numbers: Box and Muller (1958), two words for two elements.

    Elements 2j and 2j + 1 are r cos(2πv) and r sin(2πv) with r = sqrt(-2 ln u), u = (word + 1) 2^-32 in (0, 1] and
    v = (next word) 2^-32: no value is beyond ±6.66. Computed in float64 and rounded, so that devices whose
    logarithms and cosines differ in the last digit give the same float32 except about once in 10^8 elements.

    Args:
        count: how many.
        key: which stream, from `key`.
        start: the index of the first element, 0 to 2^64 - 1.
        device: where to.

    Returns:
        float32 [count].
    """
    out = np.empty(count, dtype=np.float32)
    stream = Stream(key, min(count, _SPAN) + 2)
    for lo in range(0, count, _SPAN):
        part = out[lo : lo + _SPAN]
        odd = (start + lo) % 2
        words = stream.take(start + lo - odd, 2 * ((part.size + odd + 1) // 2)).reshape(-1, 2)
        radius = np.sqrt(-2.0 * np.log((words[:, 0] + 1.0) * 2.0**-32))
        angle = words[:, 1] * (2.0 * np.pi * 2.0**-32)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1, dtype=np.float32)
        part[:] = pairs.reshape(-1)[odd : odd + part.size]
    return torch.from_numpy(out).to(device or "cpu")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def four_words(seed, first, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the four words of this program's counters, each uint32 [COUNTERS]."""
    counter = first + tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    zero = tl.zeros((COUNTERS,), dtype=tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def in_order(w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Return four blocks as one, in the order of the elements."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def words_of(seed, first, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the words of this program's elements, uint32 [4 COUNTERS]."""
    w0, w1, w2, w3 = four_words(seed, first, COUNTERS)
    return in_order(w0, w1, w2, w3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def uniform_of(words):  # type: ignore[no-untyped-def]
    """Return words as float32 in [0, 1)."""
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["seed", "first"])  # type: ignore[untyped-decorator, unused-ignore]
def _uniform_kernel(out, seed, first, count, SKIPPED: tl.constexpr, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS) - SKIPPED
    tl.store(out + at, uniform_of(words_of(seed, first, COUNTERS)), mask=(at >= 0) & (at < count))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pair(u, v):  # type: ignore[no-untyped-def]
    radius = tl.sqrt(-2.0 * tl.log((u.to(tl.float64) + 1.0) * 2.3283064365386963e-10))
    angle = v.to(tl.float64) * 1.4629180792671596e-09
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "first"])  # type: ignore[untyped-decorator, unused-ignore]
def _normal_kernel(out, seed, first, count, SKIPPED: tl.constexpr, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS) - SKIPPED
    w0, w1, w2, w3 = four_words(seed, first, COUNTERS)
    z0, z1 = _pair(w0, w1)
    z2, z3 = _pair(w2, w3)
    tl.store(out + at, in_order(z0, z1, z2, z3), mask=(at >= 0) & (at < count))


def seed_of(key: Key) -> int:
    """Return a key as Triton takes it: one signed number of 64 bits."""
    joined = key[0] | key[1] << 32
    return joined - (1 << 64) if joined >> 63 else joined


def uniform_fast(count: int, key: Key, start: int = 0, device: Device = None) -> Tensor:
    """Do what `uniform_reference` does."""
    return _launch(_uniform_kernel, count, key, start, device)


def normal_fast(count: int, key: Key, start: int = 0, device: Device = None) -> Tensor:
    """Do what `normal_reference` does."""
    return _launch(_normal_kernel, count, key, start, device)


def _launch(kernel: Any, count: int, key: Key, start: int, device: Device) -> Tensor:
    out = torch.empty(count, dtype=torch.float32, device=device or "cpu")
    first, skipped = divmod(start, 4)
    if count:
        grid = (triton.cdiv(count + skipped, _BLOCK),)
        kernel[grid](out, seed_of(key), first, count, SKIPPED=skipped, COUNTERS=_BLOCK // 4)
    return out


def cases() -> Iterable[Case]:
    """Sizes around the block, starts inside and between counters and beyond 2^32 counters, extreme keys."""
    top = 0xFFFFFFFF
    for count, start, of in (
        (1, 0, (0, 0)), (1024, 0, key(0, "a")), (1021, 3, (top, top)), (2051, 1, (1, 0)), (7, 2, key(2**63 - 1, "")),
        (3000, (1 << 34) - 1500, key(7, "x")), (5, (1 << 40) + 1, (0, 1 << 31)),
    ):  # fmt: skip
        yield Case(f"{count}-from-{start}", partial(_make, count, of, start), 4 * count)


def _make(count: int, of: Key, start: int, device: torch.device) -> tuple[Any, ...]:
    return count, of, start, device


def large(moved: int) -> Case:
    """Write `moved` bytes of float32."""
    return Case("float32", partial(_make, moved // 4, key(0, "large"), 0), moved)


def _plain_uniform(count: int, _key: Key, _start: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device)


def _plain_normal(count: int, _key: Key, _start: int, device: torch.device) -> Tensor:
    return torch.randn(count, device=device)


uniform = Kernel("philox.uniform", uniform_reference, uniform_fast, cases, large, _plain_uniform)
normal = Kernel("philox.normal", normal_reference, normal_fast, cases, large, _plain_normal, tolerance=1e-6)
