"""The generator against the published vectors and against the rounds written out in Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import philox

WORD = st.integers(0, 2**32 - 1)
KEY = st.tuples(WORD, WORD)
VECTORS = [
    ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def split(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))


def slowly(counter: tuple[int, ...], key: philox.Key) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ k0, two & 0xFFFFFFFF, (one >> 32) ^ c3 ^ k1, one & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def word(i: int, key: philox.Key) -> int:
    counter = i // 4
    return slowly((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key)[i % 4]


def words(start: int, count: int, key: philox.Key) -> list[int]:
    return [int(value) for value in philox.Stream(key, max(1, count)).take(start, count)]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_published_vectors(counter: str, key: str, want: str) -> None:
    c0, c1, c2, c3 = split(counter)
    k0, k1 = split(key)
    x, y = (np.array([high << 32 | low], dtype=np.uint64) for high, low in ((c0, c1), (c2, c3)))
    x, y = philox.rounds(x, y, np.empty_like(x), np.empty_like(x), (k0, k1))
    got = (int(x[0]) >> 32, int(x[0]) & 0xFFFFFFFF, int(y[0]) >> 32, int(y[0]) & 0xFFFFFFFF)
    assert got == tuple(int(text, 16) for text in want.split()) == slowly((c0, c1, c2, c3), (k0, k1))


@given(st.integers(0, 2**64 - 100), st.integers(0, 20), KEY)
def test_words_from_any_start(start: int, count: int, key: philox.Key) -> None:
    assert words(start, count, key) == [word(start + i, key) for i in range(count)]


def test_words_across_the_counters_first_word() -> None:
    start = 4 * 2**32 - 6
    assert words(start, 12, (1, 2)) == [word(start + i, (1, 2)) for i in range(12)]


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 1000), st.sampled_from(["uniform", "normal"]))
def test_blocks_join_to_the_whole(sizes: list[int], start: int, which: str) -> None:
    make = getattr(philox, which)
    whole = make(sum(sizes), (3, 4), start)
    begins = [start + sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [make(size, (3, 4), begin) for size, begin in zip(sizes, begins, strict=True)]
    assert torch.equal(torch.cat([*blocks, torch.empty(0)]), whole)


@pytest.mark.parametrize("which", ["uniform", "normal"])
def test_blocks_join_over_the_spans(which: str) -> None:
    make = getattr(philox, which)
    whole = make(150_000, (3, 4), 1)
    assert torch.equal(torch.cat([make(65_536, (3, 4), 1), make(84_464, (3, 4), 65_537)]), whole)


def test_uniform_takes_the_upper_bits() -> None:
    want = [(word(i, (9, 9)) >> 8) * 2.0**-24 for i in range(100)]
    assert philox.uniform(100, (9, 9)).tolist() == want


def test_uniform_is_spread_evenly() -> None:
    got = philox.uniform(400_000, philox.key(1, "even"))
    counts = torch.histc(got, bins=100, min=0, max=1)
    assert got.min() >= 0
    assert got.max() < 1
    assert ((counts - 4000) ** 2 / 4000).sum() < 160, "chi-square of 99 degrees: 1 in 10,000 seeds is beyond"


def test_normal_is_normal() -> None:
    got = philox.normal(400_000, philox.key(1, "normal")).double()
    assert got.mean().abs() < 0.007
    assert (got.var() - 1).abs() < 0.01
    assert ((got**4).mean() - 3).abs() < 0.06
    assert (got[::2] * got[1::2]).mean().abs() < 0.007, "the two of a pair are independent"
    assert abs((got.abs() > 1.959964).double().mean() - 0.05) < 0.0015


def test_normal_is_box_and_muller() -> None:
    u = [(word(i, (5, 6)) + (1 - i % 2)) * 2.0**-32 for i in range(20)]
    want = [
        np.sqrt(-2 * np.log(u[i - i % 2])) * (np.sin if i % 2 else np.cos)(2 * np.pi * u[i + 1 - i % 2])
        for i in range(20)
    ]
    torch.testing.assert_close(philox.normal(20, (5, 6)), torch.tensor(want).float(), rtol=1e-6, atol=1e-6)


def test_keys_differ_by_seed_and_by_name() -> None:
    keys = {philox.key(seed, name) for seed in (0, 1, 256, 2**63 - 1) for name in ("", "a", "b", "é", "\ud800")}
    assert len(keys) == 20
    assert philox.key(0, "a") == (0xAF9EB97B, 0x2A2AD578), "a key that changes would change every seeded merge"


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        philox.key(seed, "a")


def test_nothing_is_fine() -> None:
    assert philox.uniform(0, (1, 1)).shape == philox.normal(0, (1, 1)).shape == (0,)
