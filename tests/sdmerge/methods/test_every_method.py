"""What every merge method must get through: equal models, no difference, odd shapes, odd types."""

from __future__ import annotations

import pytest
import torch

from sdmerge import methods as _registered  # noqa: F401 - registers them
from sdmerge.method import METHODS
from tests.sdmerge.methods.calls import call, random

SHAPES = ((), (1,), (7,), (5, 6), (1, 6), (5, 1), (4, 3, 3, 3), (0,), (0, 4), (3, 0))
CHANGES_EQUAL_MODELS = {"plus_random"}
"""Methods that do not give the model back where all are equal, because they are there to change it."""


def count(name: str) -> int:
    """How many tensors to give: two models or three, and the base."""
    method = METHODS[name]
    return (len(method.models) or 3) + (method.base == "required")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS.keys() - CHANGES_EQUAL_MODELS))
def test_equal_models(name: str, dtype: torch.dtype) -> None:
    """Equal models, the base among them, give that model, bit for bit; in every shape."""
    for shape in SHAPES:
        x = random(shape, 1, dtype)
        result = call(name, [x.clone() for _ in range(count(name))])
        assert result.shape == shape
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(result, x.to(result.dtype)), f"{name}: equal models of shape {shape} give another one"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_finite(name: str) -> None:
    """Finite inputs of every shape, zeros, constants, parallel and opposite vectors give finite results; inputs stay."""
    for shape in SHAPES:
        x, y, z, w = (random(shape, seed) for seed in range(2, 6))
        zero, one = torch.zeros(shape), torch.ones(shape)
        for case in (
            (x, y, z, w), (zero, zero, zero, zero), (zero, x, zero, zero), (x, zero, x, zero), (x, x, x, zero),
            (one, 2 * one, -one, zero), (one, 3 * one, one, 2 * one), (x, 2 * x, 3 * x, zero), (x, -x, x, zero),
            (x, -2 * x, zero, x), (1e-30 * x, 1e-30 * y, -1e-30 * x, zero), (1e15 * x, 1e15 * y, 1e15 * z, zero),
        ):  # fmt: skip
            given = [one_.clone() for one_ in (*case[: count(name) - 1], case[3])]
            before = [one_.clone() for one_ in given]
            result = call(name, given)
            assert result.shape == shape
            assert torch.isfinite(result).all(), f"{name}: {case} gives {result}"
            assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), f"{name} changes its inputs"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_types(name: str) -> None:
    """What is stored in half precision is computed as if it were float32; float64 stays, and is close to float32."""
    tensors = [random((5, 6), seed, torch.float16) for seed in range(count(name))]
    result = call(name, [x.clone() for x in tensors])
    wide = call(name, [x.float() for x in tensors])
    assert result.dtype == wide.dtype == torch.float32
    assert torch.equal(result, wide)
    precise = call(name, [x.double() for x in tensors])
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise, wide.double(), rtol=1e-5, atol=1e-6)
