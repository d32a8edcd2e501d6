"""Perpendicular, geometric median and clamp against plain float64 and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.method import find
from sdmerge.methods.geometry import clamp, geometric_median, perpendicular
from tests.sdmerge.methods.calls import call, random

SHAPES = ((200,), (12, 31), (4, 3, 3, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_perpendicular(shape: tuple[int, ...], alpha: float) -> None:
    a, b, c = (random(shape, seed) for seed in range(3))
    own, other = (a - c).double().numpy(), (b - c).double().numpy()
    part = other - own * np.vdot(own, other) / np.vdot(own, own)
    expected = a.double().numpy() + alpha * part
    np.testing.assert_allclose(perpendicular(a, b, c, alpha=alpha).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert abs(np.vdot(part, own)) < 1e-9


def test_perpendicular_of_known_directions() -> None:
    c, x, y = torch.zeros(2), torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.equal(perpendicular(x, y, c), x + y)
    assert torch.equal(perpendicular(x, x + y, c), x + y)
    assert torch.equal(perpendicular(x, 4 * x, c), x)  # parallel
    assert torch.equal(perpendicular(x, -2 * x, c), x)  # antiparallel
    assert torch.equal(perpendicular(x, c, c), x)  # B learned nothing
    assert torch.equal(perpendicular(c, y, c), y)  # A learned nothing: no direction is taken


def median(points: list[np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    """Return the geometric median by gradient descent on a smoothed sum of distances, ever less smoothed."""
    stack = np.stack(points)
    shares = np.array(weights) / sum(weights)
    at = shares @ stack
    for smoothing in 10.0 ** -np.arange(0, 9):
        for _ in range(60):
            pull = shares / np.sqrt(np.square(stack - at).sum(1) + smoothing**2)
            at = pull @ stack / pull.sum()
    return at


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.8), (0.7, 1.0, 0.0), (0.5, 0.5, 0.4, 0.9)], ids=str)
def test_geometric_median(weights: tuple[float, ...]) -> None:
    tensors = [random((6, 5), seed) for seed in range(len(weights))]
    expected = median([x.double().numpy().ravel() for x in tensors], weights).reshape(6, 5)
    result = geometric_median(*tensors, weights=weights, iterations=2000)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_geometric_median_of_a_triangle() -> None:
    tensors = [torch.tensor(point, dtype=torch.float64) for point in ([0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)])]
    result = geometric_median(*tensors, weights=(1.0, 1.0, 1.0))
    torch.testing.assert_close(result, torch.tensor([0.5, math.sqrt(0.75) / 3], dtype=torch.float64))
    # A corner of 120 degrees or more is the median itself.
    wide = [torch.tensor(point) for point in ([0.0, 0.0], [1.0, 0.1], [-1.0, 0.1])]
    assert torch.equal(geometric_median(*wide, weights=(1.0, 1.0, 1.0)), wide[0])


def test_geometric_median_withstands_an_odd_model() -> None:
    x = random((50,), 1)
    near = [x + 1e-3 * random((50,), seed) for seed in range(2, 6)]
    result = geometric_median(*near, 1e4 * random((50,), 9), weights=(1.0,) * 5)
    assert (result - x).norm() < 0.01
    assert torch.equal(geometric_median(x, x, 5 * x + 1, weights=(1.0,) * 3), x)  # most agree
    assert torch.equal(geometric_median(-x, x, weights=(0.4, 0.6)), x)  # the heavier of two


def test_geometric_median_where_it_is_not_unique() -> None:
    x, y = random((9,), 1), random((9,), 2)
    torch.testing.assert_close(geometric_median(x, y, weights=(1.0, 1.0)), (x + y) / 2)
    line = [torch.tensor([value]) for value in (0.0, 1.0, 2.0, 9.0)]
    result = geometric_median(*line, weights=(1.0,) * 4).item()
    assert 1 <= result <= 2


def test_geometric_median_leaves_a_mean_that_is_a_model() -> None:
    # The mean is the first point, which is not the median: on the x axis lies more weight to its left.
    points = [[0.0, 0.0], [3.0, 0.0], [-1.0, 0.1], [-1.0, -0.1], [-1.0, 0.0]]
    tensors = [torch.tensor(point, dtype=torch.float64) for point in points]
    result = geometric_median(*tensors, weights=(1.0,) * 5, iterations=5000)
    expected = median([x.numpy() for x in tensors], (1.0,) * 5)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)
    assert result[0] < -0.9


def test_geometric_median_stops() -> None:
    tensors = [random((30,), seed) for seed in range(3)]
    ones = (1.0, 1.0, 1.0)
    torch.testing.assert_close(geometric_median(*tensors, weights=ones, iterations=0), sum(tensors) / 3)
    first = geometric_median(*tensors, weights=ones, iterations=1)
    assert torch.equal(geometric_median(*tensors, weights=ones, tolerance=1e9), first)
    assert not torch.equal(geometric_median(*tensors, weights=ones), first)


def test_geometric_median_refuses_weights() -> None:
    x = torch.ones(3)
    with pytest.raises(RequestError, match="1 weights for 2 models"):
        geometric_median(x, x)
    with pytest.raises(RequestError, match="add up to 0"):
        geometric_median(x, x, weights=(0.0, 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stiffness", [0.0, 0.4, 1.0])
def test_clamp(shape: tuple[int, ...], stiffness: float) -> None:
    first, *bounds = (random(shape, seed) for seed in range(5))
    stack = np.sort(np.stack([x.double().numpy() for x in bounds]), axis=0)
    mean = stack.mean(0)
    above = np.where(stack >= mean, stack, np.inf).min(0)
    below = np.where(stack <= mean, stack, -np.inf).max(0)
    high = (1 - stiffness) * stack[-1] + stiffness * above
    low = (1 - stiffness) * stack[0] + stiffness * below
    expected = np.clip(first.double().numpy(), low, high)
    result = clamp(first, *bounds, stiffness=stiffness).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert (result != first.numpy()).any()


def test_clamp_known() -> None:
    bounds = [torch.full((4,), value) for value in (0.0, 1.0, 2.0)]
    x = torch.tensor([-1.0, 0.5, 1.5, 5.0])
    assert clamp(x, *bounds).tolist() == [0.0, 0.5, 1.5, 2.0]
    assert clamp(x, *bounds, stiffness=1.0).tolist() == [1.0] * 4  # the middle one is the mean
    assert clamp(x, *bounds, stiffness=0.5).tolist() == [0.5, 0.5, 1.5, 1.5]
    assert clamp(x, bounds[0], bounds[2], stiffness=1.0).tolist() == [0.0, 0.5, 1.5, 2.0]
    same = [torch.full((4,), 0.1)] * 3
    assert torch.equal(clamp(x, *same, stiffness=1.0), same[0])


def test_clamp_needs_a_range() -> None:
    with pytest.raises(RequestError, match="takes 3 models or more"):
        find("clamp").check_models(2, base=False)
    with pytest.raises(RequestError, match="stiffness is 1.5"):
        call("clamp", [torch.ones(2)] * 3, stiffness=1.5)
