"""Interpolation on spheres, against the formulas in float64, vector by vector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.methods.spheres import karcher, multislerp, nuslerp, slerp
from tests.sdmerge.methods.calls import random


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Turn one vector into another, by the book."""
    theta = math.acos(float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("shape", [(50,), (6, 9), (4, 3, 3, 3)], ids=str)
def test_slerp(shape: tuple[int, ...], t: float) -> None:
    a, b = random(shape, 1), random(shape, 2)
    expected = arc(a.double().numpy().ravel(), b.double().numpy().ravel(), t).reshape(shape)
    np.testing.assert_allclose(slerp(a, b, t=t).numpy(), expected, rtol=1e-5, atol=1e-6)
    exact = slerp(a.double(), b.double(), t=t).numpy()
    np.testing.assert_allclose(exact, expected, rtol=1e-13, atol=1e-13)


def test_slerp_ends_are_the_models() -> None:
    a, b = random((40,), 1, torch.float16), random((40,), 2, torch.float16)
    assert torch.equal(slerp(a, b, t=0.0), a.float())
    assert torch.equal(slerp(a, b, t=1.0), b.float())


def test_slerp_goes_straight_where_there_is_no_arc() -> None:
    a = random((40,), 1)
    near = a + 0.01 * random((40,), 2)
    for b in (near, -a, 3 * a, torch.zeros(40)):
        torch.testing.assert_close(slerp(a, b, t=0.3), 0.7 * a + 0.3 * b, rtol=1e-5, atol=1e-6)


def test_slerp_of_right_angles_keeps_the_length() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(slerp(a, b, t=0.5), torch.full((2,), 3 / math.sqrt(2)))


@pytest.mark.parametrize("based", [False, True])
def test_nuslerp_of_whole_tensors(based: bool) -> None:
    a, b = random((6, 9), 1), random((6, 9), 2)
    base = random((6, 9), 3) if based else None
    origin = base.double().numpy().ravel() if base is not None else np.zeros(54)
    turned = arc(a.double().numpy().ravel() - origin, b.double().numpy().ravel() - origin, 0.75)
    result = nuslerp(a, b, base=base, weights=(1.0, 3.0))
    np.testing.assert_allclose(result.numpy().ravel(), origin + turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (4, 3, 2, 5)], ids=str)
def test_nuslerp_of_single_vectors(shape: tuple[int, ...], row_wise: bool, based: bool) -> None:
    a, b = random(shape, 1), random(shape, 2)
    b.view(-1, shape[-1])[0] = a.view(-1, shape[-1])[0]  # one vector that is the same in both
    base = random(shape, 3) if based else torch.zeros(shape)
    axis = 0 if row_wise else -1
    expected = np.empty(shape)
    arrays = [np.moveaxis(x.double().numpy(), axis, -1) for x in (a, b, base)]
    into = np.moveaxis(expected, axis, -1)
    for at in np.ndindex(into.shape[:-1]):
        x, y, origin = (array[at] for array in arrays)
        into[at] = x if np.array_equal(x, y) else origin + arc(x - origin, y - origin, 0.4)
    result = nuslerp(a, b, base=base if based else None, weights=(0.6, 0.4), flatten=False, row_wise=row_wise)
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-5, atol=1e-5)
    if not row_wise:
        assert torch.equal(result.view(-1, shape[-1])[0], a.view(-1, shape[-1])[0])


def test_nuslerp_weights_that_cancel_count_as_equal() -> None:
    a, b = random((6, 9), 1), random((6, 9), 2)
    assert torch.equal(nuslerp(a, b, weights=(1.0, -1.0)), nuslerp(a, b, weights=(2.0, 2.0)))


@pytest.mark.parametrize("based", [False, True])
def test_multislerp(based: bool) -> None:
    models = [random((6, 9), seed) for seed in range(3)]
    base = random((6, 9), 7) if based else None
    weights = np.array([0.5, 1.0, 2.0])
    share = weights / weights.sum()
    origin = base.double().numpy() if base is not None else 0.0
    deltas = [x.double().numpy() - origin for x in models]
    norms = np.array([np.linalg.norm(d) for d in deltas])
    direction = sum(w * d / n for w, d, n in zip(share, deltas, norms, strict=True))
    expected = origin + (share @ norms) * direction / np.linalg.norm(direction)
    result = multislerp(*models, base=base, weights=tuple(weights))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_multislerp_of_opposite_models_is_their_weighted_sum() -> None:
    x = random((6, 9), 1)
    torch.testing.assert_close(multislerp(x, -2 * x, weights=(1.0, 1.0)), -0.5 * x)
    zero = torch.zeros(4)
    assert torch.equal(multislerp(zero, zero, zero, base=zero, weights=(1.0,) * 3), zero)


def test_multislerp_of_right_angles() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(multislerp(a, b, weights=(1.0, 1.0)), torch.full((2,), 3 / math.sqrt(2)))


def test_weights_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(RequestError, match="3 weights for 2 models"):
        multislerp(x, x, weights=(1.0, 1.0, 1.0))
    with pytest.raises(RequestError, match="add up to 0"):
        multislerp(x, x, weights=(1.0, -1.0))
    with pytest.raises(RequestError, match="add up to 0"):
        karcher(x, x, weights=(0.0, 0.0))


def test_karcher_mean_pulls_evenly_in_all_directions() -> None:
    models = [random((5, 8), seed) + 1 for seed in range(4)]
    weights = (1.0, 2.0, 0.5, 1.5)
    mean = karcher(*[x.double() for x in models], weights=weights, iterations=200, tolerance=1e-13).numpy().ravel()
    vectors = [x.double().numpy().ravel() for x in models]
    share = np.array(weights) / sum(weights)
    norms = np.array([np.linalg.norm(v) for v in vectors])
    assert np.linalg.norm(mean) == pytest.approx(share @ norms, rel=1e-12)
    unit = mean / np.linalg.norm(mean)
    pull = np.zeros_like(unit)
    for w, v, n in zip(share, vectors, norms, strict=True):
        cos = unit @ v / n
        theta = math.acos(cos)
        pull += w * theta / math.sin(theta) * (v / n - cos * unit)
    assert np.linalg.norm(pull) < 1e-10


def test_karcher_mean_of_two_is_half_way() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(karcher(a, b, weights=(1.0, 1.0)), torch.full((2,), math.sqrt(2)))


def test_karcher_mean_of_opposites_is_the_first_with_the_mean_length() -> None:
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(karcher(x, -x, weights=(1.0, 1.0)), x)


def test_karcher_counts_a_zero_for_the_length_only() -> None:
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(karcher(x, torch.zeros(2), weights=(1.0, 1.0)), x / 2)
