"""Selection and elections in native code against their references: the same bits for any types, sizes and patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import native, select, ties
from tests.kernels.test_native import TYPE, WEIGHT, assert_same_bits, patterns

if TYPE_CHECKING:
    from sdkernels.native import Library

INFINITY = 0x7F800000
"""As bits: those of NaN are larger, and may be any of them."""
SIZE = st.integers(1, 150)
SEED = st.integers(0, 1 << 20)
many = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(autouse=True)
def _with_library(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(native, "LIBRARY", library)


@given(TYPE, TYPE, SIZE, SEED, st.booleans(), st.data())
@many
def test_magnitudes_between_bounds(
    one: torch.dtype, other: torch.dtype, count: int, seed: int, paired: bool, data: st.DataObject
) -> None:
    x, base = patterns(one, count, seed), patterns(other, count, seed + 1) if paired else None
    bits = (x.float() - base.float() if base is not None else x.float()).abs().view(torch.int32)
    drawn = st.sampled_from([-1, INFINITY, *(number for number in bits.tolist()[:8] if number < INFINITY)])
    low, high = sorted((data.draw(drawn), data.draw(drawn)))
    found = native.inside(x, base, low, high, count)
    assert found is not None
    counts = (int((bits > low).sum()), int((bits >= low).sum()), int((bits > high).sum()), int((bits >= high).sum()))
    assert found[:4] == counts
    assert found.between.tolist() == bits[(bits > low) & (bits < high)].tolist()
    if len(found.between):
        assert native.inside(x, base, low, high, len(found.between) - 1) is None


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 1000, 40_001, 300_007])
def test_the_kth_is_the_sorted_one(
    dtype: torch.dtype, count: int, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, base = torch.randn((2, count), generator=torch.Generator().manual_seed(count)).to(dtype)
    x[::3] = x[0]  # many ties
    change = (x.float() - base.float() if paired else x.float()).abs()
    in_order = change.sort(descending=True).values
    for k in {1, max(1, count // 5), count}:
        got = select.kth_magnitude(x, k, base if paired else None)
        assert torch.equal(got, in_order[k - 1])
        with monkeypatch.context() as without:
            without.setattr(native, "LIBRARY", None)
            assert torch.equal(select.kth_magnitude(x, k, base if paired else None), got)


@st.composite
def elections(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Models of every mix of types, one to more than native code takes, with thresholds that some changes equal."""
    count, seeds = draw(SIZE), iter(range(draw(SEED), 1 << 30))
    base = patterns(draw(TYPE), count, next(seeds))
    models = [patterns(draw(TYPE), count, next(seeds)) for _ in range(draw(st.sampled_from([1, 2, 3, 5, 17])))]
    if draw(st.booleans()):
        models[-1] = base.clone()
    changes = [(x.float() - base.float()).abs() for x in models]
    thresholds: list[float | Tensor] = [
        draw(st.sampled_from([0.0, 0.5, float("nan"), float("inf"), *change[:3].tolist()])) for change in changes
    ]
    options = {
        "scale": draw(WEIGHT),
        "normalize": draw(st.booleans()),
        "vote": draw(st.sampled_from(["sum", "count"])),
        "out": torch.empty(count, dtype=draw(TYPE)) if draw(st.booleans()) else None,
    }
    return (base, models, [draw(WEIGHT) for _ in models], thresholds), options


@given(elections())
@many
def test_elections_have_the_bits_of_the_reference(case: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    arguments, options = case
    want = ties.reference(*arguments, **options).clone()
    assert_same_bits(ties.merge(*arguments, **options), want)


def test_what_it_is_not_for() -> None:
    x = torch.arange(6.0)
    for other in (x.double(), x.long(), torch.arange(12.0)[::2]):
        assert native.inside(other, None, 0, 1, 6) is None
        assert not native.elect(other, [(other, 1.0, 0.0)], other, scale=1, normalize=True, by_count=False)
