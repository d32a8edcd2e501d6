"""Stochastic rounding: only neighbours, exact values stay, the mean is the value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import cast, philox, rounding

TYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
KEY = philox.key(5, "weight")


def every(dtype: torch.dtype) -> Tensor:
    """Return all finite values of a type, in order, -0 and 0 once."""
    if dtype.itemsize == 1:
        values = torch.arange(256, dtype=torch.uint8).view(dtype)
    else:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.tensor(sorted(set(values.double()[values.double().isfinite()].tolist())), dtype=torch.float64)


def rounded(x: Tensor, dtype: torch.dtype, start: int = 0, key: philox.Key = KEY) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    assert rounding.stochastic(x, out, key, start) is out
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_values_of_the_type_stay(dtype: torch.dtype, wide: torch.dtype) -> None:
    x = every(dtype).to(wide)
    for start in (0, 1, 1 << 20):
        assert torch.equal(rounded(x, dtype, start).to(wide), x)


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=30), st.sampled_from(TYPES), st.integers(0, 99))
def test_one_of_the_two_neighbours(values: list[float], dtype: torch.dtype, start: int) -> None:
    x, known = torch.tensor(values), every(dtype)
    got = rounded(x, dtype, start).double()
    right = torch.searchsorted(known, x.double()).clamp(max=known.numel() - 1)
    left = torch.where(known[right] == x.double(), right, (right - 1).clamp(min=0))
    assert ((got == known[left]) | (got == known[right])).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("place", ["normal", "subnormal", "lowest"])
def test_probability_is_the_nearness(dtype: torch.dtype, fraction: float, place: str) -> None:
    info, known = torch.finfo(dtype), every(dtype)
    begin = {"normal": 1.0, "subnormal": info.smallest_normal / 2, "lowest": 0.0}[place]
    at = int(torch.searchsorted(known, torch.tensor(begin, dtype=torch.float64)))
    low, high = known[at].item(), known[at + 1].item()
    for sign in (1, -1):
        x = torch.full((20_000,), sign * (low + fraction * (high - low)))
        share = (rounded(x, dtype).double() == sign * high).double().mean().item()
        assert abs(share - fraction) < 0.015


def test_one_decision_by_hand() -> None:
    x = 1 + torch.full((1000,), 0.3) * 2.0**-10
    up = philox.uniform(1000, KEY, 7) < (x.double() - 1) * 2**10
    assert torch.equal(rounded(x, torch.float16, 7).double(), 1 + up.double() * 2.0**-10)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_top_end(dtype: torch.dtype) -> None:
    top, last = torch.finfo(dtype).max, torch.tensor(cast.limit(dtype), dtype=torch.float64)
    beyond = torch.nextafter(last, torch.tensor(torch.inf, dtype=torch.float64))
    x = torch.stack([(top + last) / 2, last, beyond, torch.full_like(last, torch.inf)])
    assert rounded(x, dtype).double()[:2].tolist() == rounded(-x, dtype).double().neg()[:2].tolist() == [top, top]
    over = rounded(x, dtype)[2:].double()
    if dtype == torch.float8_e4m3fn:
        assert over.isnan().all()
    else:
        assert over.tolist() == [torch.inf] * 2
    assert rounded(torch.tensor([torch.nan, -torch.nan]), dtype).double().isnan().all()


def test_float64_to_float32() -> None:
    x = torch.full((20_000,), 1 + 0.25 * 2.0**-23, dtype=torch.float64)
    got = rounded(x, torch.float32).double()
    assert set(got.tolist()) == {1.0, 1 + 2.0**-23}
    assert abs((got > 1).double().mean().item() - 0.25) < 0.015


def test_wider_types_take_every_value() -> None:
    x = torch.tensor([1e-45, 3.0e38, -0.1])
    assert torch.equal(rounded(x, torch.float64), x.double())
    assert torch.equal(rounded(x, torch.float32), x)
    assert torch.equal(rounded(x.half(), torch.float32), x.half().float())


@given(st.lists(st.integers(0, 30), max_size=5), st.sampled_from(TYPES))
def test_blocks_join_to_the_whole(sizes: list[int], dtype: torch.dtype) -> None:
    x = philox.normal(sum(sizes), (1, 1))
    whole, at = rounded(x, dtype, 3), 0
    for size in sizes:
        assert torch.equal(rounded(x[at : at + size], dtype, 3 + at).float(), whole[at : at + size].float())
        at += size


def test_spans_and_strides() -> None:
    x = philox.normal(140_000, (1, 1)).view(350, 400)
    whole = rounded(x, torch.bfloat16)
    assert torch.equal(rounded(x.flatten()[65_537:], torch.bfloat16, 65_537), whole.flatten()[65_537:])
    out = torch.empty(400, 350, dtype=torch.bfloat16).T
    assert rounding.stochastic(x, out, KEY) is out
    assert torch.equal(out, whole)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    assert torch.equal(rounded(torch.ones(shape), torch.float16), torch.ones(shape).half())


def test_signs_are_kept() -> None:
    got = rounded(torch.tensor([-0.0, 0.0, -1e-30]), torch.float16)
    assert got.signbit().tolist() == [True, False, True]
