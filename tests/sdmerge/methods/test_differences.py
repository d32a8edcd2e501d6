"""Differences against plain numpy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from sdmerge.methods import differences
from tests.sdmerge.methods.calls import random


def three(shape: tuple[int, ...] = (120,)) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Return A, B, C with some elements of A or B equal to C's, and the same in float64."""
    a, b, c = (random(shape, seed) for seed in range(3))
    a.view(-1)[:10] = c.view(-1)[:10]
    b.view(-1)[5:20] = c.view(-1)[5:20]
    a.view(-1)[20:30] = b.view(-1)[20:30]
    return [a, b, c], [x.double().numpy() for x in (a, b, c)]


def assert_near(got: torch.Tensor, want: Any) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_train_difference(alpha: float) -> None:
    tensors, (a, b, c) = three()
    below = np.abs(b - a) + np.abs(b - c)
    share = np.abs(b - a) / np.where(below == 0, 1, below)
    assert_near(differences.train_difference(*tensors, alpha=alpha), a + 1.8 * alpha * share * (b - c))


def test_train_difference_where_b_is_c_or_a_is_a() -> None:
    (a, b, _), _ = three()
    assert torch.equal(differences.train_difference(a, b, b), a)
    assert torch.equal(differences.train_difference(a, a, b), a)


def mirrored(x: np.ndarray, width: int) -> np.ndarray:
    return np.pad(x, width, mode="symmetric") if x.ndim else x


@pytest.mark.parametrize("shape", [(), (9,), (3, 7), (2, 3, 3, 3), (1, 5)])
def test_smooth_add(shape: tuple[int, ...]) -> None:
    (x, y, z), (a, b, c) = ([random(shape, s) for s in range(3)], [random(shape, s).double().numpy() for s in range(3)])
    learned = b - c
    padded = mirrored(learned, 1)
    median = np.empty_like(learned)
    for at in np.ndindex(*shape):
        around = [
            padded[tuple(i + d for i, d in zip(at, step, strict=True))]
            for step in itertools.product(range(3), repeat=len(shape))
        ]
        median[at] = np.median(around)
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    weights /= weights.sum()
    smooth = median
    for axis in range(len(shape)):
        moved = np.moveaxis(smooth, axis, 0)
        wide = np.pad(moved, [(4, 4)] + [(0, 0)] * (moved.ndim - 1), mode="symmetric")
        filtered = sum(weight * wide[i : i + moved.shape[0]] for i, weight in enumerate(weights))
        smooth = np.moveaxis(np.asarray(filtered), 0, axis)
    assert_near(differences.smooth_add(x, y, z, alpha=0.7), a + 0.7 * smooth)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_euclidean_add_difference(alpha: float) -> None:
    tensors, (a, b, c) = three((6, 20))
    mine, theirs = (a - c) / np.linalg.norm(a - c), (b - c) / np.linalg.norm(b - c)
    target = (1 - alpha) * a + alpha * b - c
    root = np.copysign(np.sqrt((1 - alpha) * mine**2 + alpha * theirs**2), target)
    want = c + root * np.linalg.norm(target) / np.linalg.norm(root)
    assert_near(differences.euclidean_add_difference(*tensors, alpha=alpha), want)


def test_euclidean_add_difference_keeps_a_single_change() -> None:
    a, c = random((40,), 1), random((40,), 2)
    torch.testing.assert_close(differences.euclidean_add_difference(a, c, c, alpha=0.0), a)
    torch.testing.assert_close(differences.euclidean_add_difference(a, a, c, alpha=0.4), a)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.4, 0.0), (0.4, 1.0), (1.0, 0.5)])
def test_multiply_difference(alpha: float, beta: float) -> None:
    tensors, (a, b, c) = three()
    size = np.abs(a - c) ** (1 - alpha) * np.abs(b - c) ** alpha
    sign = (1 - beta) * (a - c) + beta * (b - c)
    assert_near(differences.multiply_difference(*tensors, alpha=alpha, beta=beta), c + np.copysign(size, sign))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.4, 0.5), (1.0, 0.0)])
def test_similarity_add_difference(alpha: float, beta: float) -> None:
    tensors, (a, b, c) = three()
    alike = beta * (a * b / np.maximum(np.abs(a), np.abs(b)) ** 2 + 1) / 2
    difference, mean = a + alpha * (b - c), (1 - alpha / 2) * a + alpha / 2 * b
    assert_near(
        differences.similarity_add_difference(*tensors, alpha=alpha, beta=beta), (1 - alike) * difference + alike * mean
    )


@pytest.mark.parametrize("shape", [(12,), (6, 20), (3, 4, 3, 3)])
@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(0.5, 0.0, 1.0), (0.2, 1.0, 2.0), (1.0, 0.3, 0.5)])
def test_extract(shape: tuple[int, ...], alpha: float, beta: float, gamma: float) -> None:
    tensors = [random(shape, seed) for seed in range(3)]
    a, b, base = (x.double().numpy() for x in tensors)
    mine, theirs = a - base, b - base
    cosine = (mine * theirs).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(theirs, axis=-1)
    alike = ((cosine + 1) / 2) ** gamma
    share = ((1 - beta) * alike + beta * (1 - alike))[..., None]
    want = base + ((1 - alpha) * mine + alpha * theirs) * share
    assert_near(differences.extract(*tensors[:2], base=tensors[2], alpha=alpha, beta=beta, gamma=gamma), want)
