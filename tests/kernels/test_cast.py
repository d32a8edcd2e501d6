"""Every change of type: one rounding, to nearest even, and no overflow in silence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import cast

FLOATS = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_limit_is_the_last_value_that_fits(dtype: torch.dtype) -> None:
    limit = cast.limit(dtype)
    beyond = math.nextafter(limit, math.inf)
    values = torch.tensor([limit, -limit, beyond, -beyond], dtype=torch.float64)
    rounded = cast.narrow(values, torch.empty(4, dtype=dtype)).double()
    top = torch.finfo(dtype).max
    assert rounded[:2].tolist() == [top, -top]
    assert not rounded[2:].isfinite().any()
    assert cast.overflow(values, dtype) == 2
    assert cast.narrow(values, torch.empty(4, dtype=dtype), saturate=True).double().abs().tolist() == [top] * 4


@given(st.lists(st.floats(-70000, 70000), min_size=1, max_size=50))
def test_float64_to_half_is_rounded_once(values: list[float]) -> None:
    got = cast.narrow(torch.tensor(values, dtype=torch.float64), torch.empty(len(values), dtype=torch.float16))
    with np.errstate(over="ignore"):
        want = np.array(values).astype(np.float16)
    assert got.numpy().tobytes() == want.tobytes()


def test_float64_midpoints_would_be_lost_by_two_roundings() -> None:
    just_above = 1 + 2.0**-11 + 2.0**-40  # float32 would round it to the fp16 midpoint, and that to even, 1
    x = torch.tensor([just_above, -just_above], dtype=torch.float64)
    assert cast.narrow(x, torch.empty(2, dtype=torch.float16)).tolist() == [1 + 2.0**-10, -1 - 2.0**-10]
    tiny = torch.tensor([2.0**-25 + 2.0**-60], dtype=torch.float64)
    assert cast.narrow(tiny, torch.empty(1, dtype=torch.float16)).item() == 2.0**-24


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_survive(dtype: torch.dtype) -> None:
    got = cast.narrow(torch.tensor([math.nan, math.inf]), torch.empty(2, dtype=dtype)).float()
    assert got[0].isnan()
    assert not got[1].isfinite()
    assert cast.overflow(torch.tensor([math.nan, math.inf, 1.0]), dtype) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_value_survives(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    back = cast.narrow(every.float(), torch.empty(256, dtype=dtype))
    same = (back.view(torch.uint8) == every.view(torch.uint8)) | every.float().isnan()
    assert same.all()


def test_accumulator() -> None:
    assert cast.accumulator(torch.float16, torch.bfloat16) == torch.float32
    assert cast.accumulator(torch.float16, torch.float64) == torch.float64
