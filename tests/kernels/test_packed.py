"""Products in native code against float64: any shapes and types, by both sets of instructions, in any bands of rows."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import native
from sdkernels.packed import Packed, pack

if TYPE_CHECKING:
    from sdkernels.native import Library
    from sdkernels.packed import Scaled

TYPE = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SCALE = st.sampled_from([1.0, -0.7, 0.0, 1 / 3, 250.0])
WIDE = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="the processor has no AVX-512"
        ),
    ),
]
once = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def fresh(nbytes: int) -> Tensor:
    """Return memory that holds what nobody expects."""
    return torch.full((nbytes,), 0xFF, dtype=torch.uint8)


def normal(rows: int, columns: int, dtype: torch.dtype, seed: int, gap: int = 0) -> Tensor:
    """Random numbers, with `gap` more between its rows."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns + gap, generator=source).to(dtype)[:, :columns]


def bounds(weight: Tensor, factors: list[Scaled], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what a sum in float32, rounded once, lies between."""
    exact, size, rank = weight.double(), weight.double().abs(), 2
    for scale, up, down in factors:
        exact = exact + scale * (up.double() @ down.double())
        size = size + abs(scale) * (up.double().abs() @ down.double().abs())
        rank += up.shape[1]
    error = size * rank * torch.finfo(torch.float32).eps / 2 + torch.finfo(torch.float32).tiny
    return (exact - error).to(dtype), (exact + error).to(dtype)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, list[Scaled], Tensor, list[int]]:
    """A weight and factors, where the result goes, and where bands of rows begin."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    factor, seeds = draw(TYPE), iter(range(draw(st.integers(0, 1 << 20)), 1 << 30))
    factors: list[Scaled] = [
        (
            draw(SCALE),
            normal(rows, rank, factor, next(seeds), draw(st.integers(0, 3))),
            normal(rank, columns, factor, next(seeds)),
        )
        for rank in draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    ]
    weight = normal(rows, columns, draw(TYPE), next(seeds), draw(st.integers(0, 9)))
    out = torch.full((rows, columns + draw(st.integers(0, 9))), 7, dtype=draw(TYPE))
    return weight, factors, out, sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})


@pytest.mark.parametrize("wide", WIDE)
@given(products())
@once
def test_one_rounding(library: Library, wide: bool, case: tuple[Tensor, list[Scaled], Tensor, list[int]]) -> None:
    weight, factors, around, edges = case
    out = around[:, : weight.shape[1]]
    packed = Packed(library, factors, fresh, wide=wide)
    for first, end in pairwise(edges):
        assert packed.add(weight[first:end], out[first:end], first)
    low, high = bounds(weight, factors, out.dtype)
    assert ((low <= out) & (out <= high)).all()
    assert (around[:, weight.shape[1] :] == 7).all()


@pytest.mark.parametrize("wide", WIDE)
def test_larger_than_any_cache(library: Library, wide: bool) -> None:
    """Several blocks of the down, several panels, and ranks that are read ahead."""
    weight = normal(100, 2113, torch.float16, 0)
    factors: list[Scaled] = [
        (0.5, normal(100, r, torch.float16, r), normal(r, 2113, torch.float16, -r)) for r in (128, 300)
    ]
    out = torch.empty_like(weight)
    assert Packed(library, factors, fresh, wide=wide).add(weight, out, 0)
    low, high = bounds(weight, factors, out.dtype)
    assert ((low <= out) & (out <= high)).all()


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(st.integers(0, 15), st.integers(0, 66), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
@once
def test_what_is_not_finite_is_told(
    library: Library, wide: bool, dtype: torch.dtype, row: int, column: int, value: float
) -> None:
    weight, up, down = (torch.ones(shape, dtype=dtype) for shape in ((16, 67), (16, 5), (5, 67)))
    packed = Packed(library, [(1.0, up, down)], fresh, wide=wide)
    out = torch.empty_like(weight)
    assert packed.add(weight, out, 0)
    assert (out == 6).all()
    weight[row, column] = value
    assert not packed.add(weight, out, 0)
    assert torch.equal(out.isfinite(), weight.isfinite())
    if dtype != torch.float32:
        weight[row, column] = torch.finfo(dtype).max
        down[:, column] = torch.finfo(dtype).max / 64
        assert not Packed(library, [(1.0, up, down)], fresh, wide=wide).add(weight, out, 0)
        assert out[row, column].isinf()


def test_what_it_is_not_for(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = torch.ones(4, 2), torch.ones(2, 6)
    monkeypatch.setattr(native, "LIBRARY", library)
    assert pack([(1.0, up, down)], fresh) is not None
    for other in (
        (up.double(), down),
        (up, down.to(torch.float8_e5m2)),
        (up, torch.ones(6, 2).T),
        (up[:, :0], down[:0]),
    ):
        assert pack([(1.0, *other)], fresh) is None
    for one in ((up, down[:1]), (up[:3], down), (up, down[:, :5])):
        assert pack([(1.0, up, down), (1.0, *one)], fresh) is None
    packed = pack([(1.0, up, down)], fresh)
    assert packed is not None
    for weight, out, first in (((4, 6), (4, 6), 1), ((4, 5), (4, 5), 0), ((4, 6), (3, 6), 0), ((4, 6), (4, 6), -1)):
        with pytest.raises(ValueError, match="of a product of 4 x 6"):
            packed.add(torch.ones(weight), torch.ones(out), first)
    monkeypatch.setattr(native, "LIBRARY", None)
    assert pack([(1.0, up, down)], fresh) is None
