"""Dropout against its definition, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import dropout, philox

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
KEY = philox.key(3, "weight")


def tensor(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, keep: float | Tensor, start: int, base: Tensor | None, rescale: bool) -> Tensor:
    chance = torch.as_tensor(keep).float()
    kept = philox.uniform(x.numel(), KEY, start) < chance
    delta = x.double() - (0 if base is None else base.double())
    return torch.where(kept, delta / chance.double() if rescale else delta, 0.0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0, None])
def test_definition(dtype: torch.dtype, rescale: bool, keep: float | None) -> None:
    x, base = tensor(999, dtype), tensor(999, dtype, 1)
    chance = torch.rand(999, generator=torch.Generator().manual_seed(2)) if keep is None else keep
    for subtracted in (None, base):
        got = dropout.drop(x, chance, KEY, 5, subtracted, rescale)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = exact(x, chance, 5, subtracted, rescale)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(got == 0, want == 0)


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 100), st.booleans())
def test_blocks_join_to_the_whole(sizes: list[int], start: int, each: bool) -> None:
    x = tensor(sum(sizes))
    chance = philox.uniform(sum(sizes), (1, 1))
    parts, at = [torch.empty(0)], 0
    for size in sizes:
        keep = chance[at : at + size] if each else 0.4
        parts.append(dropout.drop(x[at : at + size], keep, KEY, start + at))
        at += size
    assert torch.equal(torch.cat(parts), dropout.drop(x, chance if each else 0.4, KEY, start))


def test_spans_join() -> None:
    x = tensor(140_000)
    assert torch.equal(dropout.drop(x, 0.5, KEY)[65_537:], dropout.drop(x[65_537:], 0.5, KEY, 65_537))


@given(st.one_of(st.floats(0, 1, width=32), st.integers(0, 40).map(lambda i: i * 2.0**-24)))
def test_a_number_and_a_tensor_of_it_drop_alike(keep: float) -> None:
    x = tensor(500)
    for probability in (torch.full((500,), keep), torch.tensor(keep)):
        assert torch.equal(dropout.drop(x, keep, KEY), dropout.drop(x, probability, KEY))


@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_share_and_expected_value(keep: float) -> None:
    got = dropout.drop(torch.ones(200_000), keep, KEY)
    assert abs((got != 0).double().mean().item() - keep) < 0.003
    assert abs(got.double().mean().item() - 1) < 0.03
    assert set(got.tolist()) == {0.0, torch.ones(1).div(torch.tensor(keep)).item()}


def test_what_is_dropped_is_zero_even_if_it_was_not_finite() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100)
    kept = philox.uniform(300, KEY) < 0.5
    got = dropout.drop(x, 0.5, KEY)
    assert torch.equal(got[~kept], torch.zeros(int((~kept).sum())))
    assert not got[kept].isfinite().any()


def test_out_is_rounded_once_and_inputs_are_left_alone() -> None:
    x, base = tensor(60, torch.float16).view(6, 10).T, tensor(60, torch.bfloat16, 1).view(10, 6)
    before = x.clone(), base.clone()
    want = dropout.drop(x, 0.5, KEY, 0, base)
    for out in (torch.empty(10, 6, dtype=torch.float16), torch.empty(6, 10, dtype=torch.float16).T):
        assert dropout.drop(x, 0.5, KEY, 0, base, out=out) is out
        assert torch.equal(out, want.half())
    same = tensor(10)
    dropout.drop(same, 0.0, KEY)
    assert torch.equal(same, tensor(10))
    assert torch.equal(x, before[0])
    assert torch.equal(base, before[1])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0)
    assert torch.equal(dropout.drop(x, 1.0, KEY, 0, x / 2), torch.ones(shape))


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_no_probability(keep: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropout.drop(torch.ones(3), keep, KEY)


def test_same_bytes_with_two_threads() -> None:
    x, threads = tensor(200_000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dropout.drop(x, 0.3, KEY)
        torch.set_num_threads(2)
        assert torch.equal(dropout.drop(x, 0.3, KEY), alone)
    finally:
        torch.set_num_threads(threads)
