"""Sizes for aspect ratios, and the order of batches."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdmerge.train.buckets import Order, draws, mixed, permuted, size_for, sizes


@given(st.integers(128, 1280), st.sampled_from([8, 16, 32, 64]))
def test_sizes_fill_the_area_and_no_more(resolution: int, step: int) -> None:
    for width, height in sizes(resolution, step):
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution**2 < (width + step) * (height + step)


def test_known_sizes_and_choices() -> None:
    found = sizes(512, 64)
    assert {(512, 512), (768, 320), (576, 448), (640, 384)} <= set(found)
    assert size_for((1000, 1000), found) == (512, 512)
    assert size_for((4000, 2000), found)[0] > size_for((4000, 2000), found)[1]
    assert size_for((900, 1200), found) == (448, 576)
    assert sizes(64, 64) == ((64, 64),)
    assert sizes(32, 64) == ((32, 32),)


@pytest.mark.parametrize("batch", [1, 3, 4, 16])
def test_a_round_shows_every_picture_and_one_size_at_a_time(batch: int) -> None:
    groups = ((0, 1, 2, 3, 4), (5, 6), (7, 7, 7))
    order = Order(groups, batch, seed=4)
    for turn in range(3):
        seen: Counter[int] = Counter()
        for number in range(turn * order.round, (turn + 1) * order.round):
            chosen = order(number)
            assert len(chosen) == batch
            assert any(set(chosen) <= set(group) for group in groups)
            seen.update(chosen)
        assert all(seen[index] >= 1 for index in range(7))
        assert seen[7] >= 3


def test_the_order_follows_from_seed_and_number_alone() -> None:
    groups = (tuple(range(20)),)
    straight = [Order(groups, 4, seed=1)(number) for number in range(10)]
    order = Order(groups, 4, seed=1)
    assert [order(number) for number in reversed(range(10))][::-1] == straight
    assert straight != [Order(groups, 4, seed=2)(number) for number in range(10)]
    assert straight[:5] != straight[5:]


def test_seeds_differ_in_every_number() -> None:
    assert len({mixed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000
    assert mixed(1, 2) != mixed(2, 1)


def test_parts_that_are_kept_stay_in_front() -> None:
    found = permuted(["a", "b", "c", "d", "e"], 2, draws(3))
    assert found[:2] == ["a", "b"]
    assert sorted(found) == ["a", "b", "c", "d", "e"]
    assert permuted(["a"], 4, draws(3)) == ["a"]
