"""The linear kernel against float64 arithmetic rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import linear

HALF = st.floats(-100, 100, width=16)
WEIGHT = st.sampled_from([1.0, 0.5, -1.0, 0.25, 2.0, 0.7, 0.3, 0.2, 1.7, -0.35])


def half(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float16)


def exact(terms: tuple[linear.Term, ...]) -> np.ndarray:
    total = np.zeros(terms[0][1].shape, dtype=np.float64)
    for weight, first, *second in terms:
        value = first.double().numpy()
        if second:
            value = value - second[0].double().numpy()
        total += weight * value
    return total


def assert_rounded_once(got: Tensor, want: np.ndarray, largest: float) -> None:
    """The promise: equal, or one step apart where the exact value is next to the midpoint of two fp16 neighbours.

    Where large terms cancel, what float32 cannot hold of them may be more than a step of the small result.
    """
    rounded = want.astype(np.float16)
    found = got.numpy()
    differ = np.flatnonzero(found != rounded)
    for i in differ:
        low, high = sorted((float(found[i]), float(rounded[i])))
        if high - low <= 4 * 2.0**-24 * largest:
            continue
        assert np.nextafter(np.float16(low), np.float16(np.inf)) == np.float16(high), "more than one step apart"
        assert abs(want[i] - (low + high) / 2) <= 1e-6 * largest


@given(st.lists(st.tuples(HALF, HALF, HALF), min_size=1, max_size=40), WEIGHT)
def test_add_difference_is_rounded_once(rows: list[tuple[float, float, float]], alpha: float) -> None:
    a, b, c = (half(list(column)) for column in zip(*rows, strict=True))
    terms: tuple[linear.Term, ...] = ((1.0, a), (alpha, b, c))
    got = linear.combine(terms, out=torch.empty_like(a))
    assert_rounded_once(got, exact(terms), max(1.0, abs(alpha)) * float(torch.stack([a, b, c]).abs().max()))


@pytest.mark.parametrize(("alpha", "share"), [(0.5, 0.0), (1.0, 0.0), (0.7, 0.002), (0.3, 0.002)])
def test_share_of_elements_that_midpoints_decide(alpha: float, share: float) -> None:
    source = torch.Generator().manual_seed(0)
    base = torch.randn(200_000, generator=source) * 0.02
    a, b, c = ((base + torch.randn(200_000, generator=source) * 0.002).half() for _ in range(3))
    terms: tuple[linear.Term, ...] = ((1.0, a), (alpha, b, c))
    got = linear.combine(terms, out=torch.empty_like(a))
    differ = float((got.numpy() != exact(terms).astype(np.float16)).mean())
    assert differ <= share
    assert_rounded_once(got, exact(terms), float(torch.stack([a, b, c]).abs().max()))


@given(st.lists(HALF, min_size=1, max_size=20), WEIGHT)
def test_equal_b_and_c_give_a(values: list[float], alpha: float) -> None:
    a, b = half(values), half(values[::-1])
    assert torch.equal(linear.combine(((1.0, a), (alpha, b, b)), out=torch.empty_like(a)), a + 0)


def test_the_sum_is_a_fused_multiply_add() -> None:
    x = torch.full((64,), 1 + 2.0**-12)
    minus = torch.full((64,), -(1 + 2.0**-11))
    fused = linear.combine(((1.0, minus), (1 + 2.0**-12, x)))
    assert torch.equal(fused, torch.full((64,), 2.0**-24)), "the product was rounded before the sum"


def test_inputs_are_left_alone_and_never_returned() -> None:
    a = torch.ones(5)
    before = a.clone()
    only = linear.combine(((1.0, a),))
    assert only.data_ptr() != a.data_ptr()
    linear.combine(((2.0, a), (3.0, a, a)))
    assert torch.equal(a, before)


def test_float64_is_computed_in_float64() -> None:
    a = torch.tensor([1.0], dtype=torch.float64)
    tiny = torch.tensor([2.0**-40], dtype=torch.float64)
    assert linear.combine(((1.0, a), (1.0, tiny))).item() == 1 + 2.0**-40


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_type_and_shape(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (1,), (3, 0, 2), (7, 5)):
        x = torch.ones(shape).to(dtype)
        got = linear.combine(((0.5, x), (0.25, x), (0.25, x)), out=torch.empty_like(x))
        assert torch.equal(got.float(), x.float())


def test_spans_join() -> None:
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 500, generator=source).half() for _ in range(2))
    terms: tuple[linear.Term, ...] = ((1.0, a), (0.7, b, a))
    whole = linear.combine(terms)
    rows = [linear.combine(((1.0, x), (0.7, y, x))) for x, y in zip(a, b, strict=True)]
    assert torch.equal(whole, torch.stack(rows))
    out = torch.empty(500, 300, dtype=torch.float16).T
    assert linear.combine(terms, out=out) is out
    assert torch.equal(out, whole.half())
