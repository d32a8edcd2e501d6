"""Interpolation against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import lerp

VALUE = st.floats(-1000, 1000, width=32)
WEIGHT = st.floats(-2, 3, width=32)
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def exact(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    weight = t.double() if isinstance(t, Tensor) else t
    return (1 - weight) * a.double() + weight * b.double()


@given(st.lists(st.tuples(VALUE, VALUE, WEIGHT), min_size=1, max_size=30))
def test_error_is_that_of_the_values(rows: list[tuple[float, float, float]]) -> None:
    a, b, t = (torch.tensor(list(column)) for column in zip(*rows, strict=True))
    got = lerp.blend(a, b, t)
    bound = 2.0**-22 * (t.abs() + 1) * torch.maximum(a.abs(), b.abs()) + 1e-40
    assert ((got.double() - exact(a, b, t)).abs() <= bound).all()


@given(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=30), WEIGHT)
def test_a_number_and_a_tensor_of_it_give_the_same(rows: list[tuple[float, float]], t: float) -> None:
    a, b = (torch.tensor(list(column)) for column in zip(*rows, strict=True))
    want = lerp.blend(a, b, t)
    rest = torch.tensor(1.0) - torch.tensor(t)
    if t <= 0.5 or rest.item() == 1 - t:  # else 1 - t is rounded once from float64, not from float32
        assert torch.equal(lerp.blend(a, b, torch.full_like(a, t)), want)
        assert torch.equal(lerp.blend(a, b, torch.tensor(t)), want)


@given(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=30))
def test_ends_are_exact(rows: list[tuple[float, float]]) -> None:
    a, b = (torch.tensor(list(column)) for column in zip(*rows, strict=True))
    for t, want in ((0.0, a), (1.0, b)):
        assert torch.equal(lerp.blend(a, b, t), want)
        assert torch.equal(lerp.blend(a, b, torch.full_like(a, t)), want)


def test_the_nearer_end_decides() -> None:
    a, b = torch.tensor([1e8, 1.0]), torch.tensor([1.0, 1e8])
    t = 1 - 2.0**-20
    want = exact(a, b, t).float()
    assert torch.equal(lerp.blend(a, b, t), want)
    assert torch.equal(lerp.blend(a, b, torch.full((2,), t)), want)
    assert a[0] + t * (b[0] - a[0]) != want[0], "from the farther end the small value is lost"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 5), (3, 0, 2), (0, 3), (2, 3, 4)])
def test_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = torch.full(shape, 1.0).to(dtype), torch.full(shape, 2.0).to(dtype)
    for t in (
        0.25,
        0.75,
        torch.tensor(0.25),
        torch.full(shape, 0.75),
        torch.full(shape[:1] + (1,) * len(shape[1:]), 0.25),
    ):
        got = lerp.blend(a, b, t)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        fraction = float(t if isinstance(t, float) else t.flatten()[0]) if a.numel() else 0.0
        assert torch.equal(got.float(), torch.full(shape, 1 + fraction))


@pytest.mark.parametrize("t", [(300, 1), (700,), (1, 700), (300, 700), (1, 1)])
def test_weights_that_repeat(t: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 700, generator=source) for _ in range(2))
    weight = torch.rand(t, generator=source)
    want = lerp.blend(a.flatten(), b.flatten(), weight.expand(300, 700).flatten()).view(300, 700)
    assert torch.equal(lerp.blend(a, b, weight), want)
    assert torch.equal(lerp.blend(a.T, b.T, weight.expand(300, 700).T), want.T)
    out = torch.empty(700, 300, dtype=torch.float16).T
    assert lerp.blend(a, b, weight, out=out) is out
    assert torch.equal(out, want.half())


def test_inputs_are_left_alone_and_never_returned() -> None:
    a, b, t = torch.ones(5), torch.zeros(5), torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0])
    for weight in (0.0, 1.0, t):
        got = lerp.blend(a, b, weight)
        got.fill_(9)
        assert torch.equal(a, torch.ones(5))
        assert torch.equal(b, torch.zeros(5))
    assert torch.equal(t, torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]))


def test_equal_ends_stay() -> None:
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for t in (0.3, 0.7, torch.rand(1000, generator=torch.Generator().manual_seed(1))):
        assert torch.equal(lerp.blend(a, a.clone(), t), a)
