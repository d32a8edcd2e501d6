"""Crossovers, regions and choices: against numpy's transforms, and by what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdmerge.method import Place
from sdmerge.methods import crossover as methods
from tests.sdmerge.methods.calls import random

PLACE = Place("w")


def test_crossover_takes_slow_waves_from_a_and_fast_ones_from_b() -> None:
    at = torch.arange(64) / 64 * 2 * torch.pi
    slow, fast = torch.cos(2 * at), torch.cos(30 * at)
    mixed = methods.crossover(slow, fast, alpha=0.5)
    torch.testing.assert_close(mixed, slow + fast, atol=1e-5, rtol=0)
    none = methods.crossover(fast, slow, alpha=0.5)
    torch.testing.assert_close(none, torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(methods.crossover(fast, slow, alpha=0.5, tilt=2.0), slow + fast, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40,), (6, 9), (4, 3, 3, 3)])
def test_crossover_at_its_ends(shape: tuple[int, ...]) -> None:
    a, b = random(shape, 1), random(shape, 2)
    assert torch.equal(methods.crossover(a, b, alpha=0.0, tilt=0.4), a)
    assert torch.equal(methods.crossover(a, b, alpha=1.0, tilt=0.4), b)
    torch.testing.assert_close(methods.crossover(a, b, alpha=0.3, tilt=1.0), a.lerp(b, 0.3))


@pytest.mark.parametrize(("alpha", "tilt"), [(0.5, 0.0), (0.3, 0.4), (1.0, 0.0)])
def test_distribution_crossover(alpha: float, tilt: float) -> None:
    tensors = [random((6, 9), seed) for seed in range(3)]
    a, b, c = (x.double().numpy().ravel() for x in tensors)
    order = np.argsort(c, kind="stable")
    mine, theirs = np.fft.rfft(a[order]), np.fft.rfft(b[order])
    at = np.arange(mine.size) / mine.size
    share = np.clip((at - alpha) / tilt + 0.5, 0, 1) if tilt else (at >= alpha).astype(float)
    want = np.empty_like(a)
    want[order] = np.fft.irfft((1 - share) * mine + share * theirs, 54)
    got = methods.distribution_crossover(*tensors, alpha=alpha, tilt=tilt)
    np.testing.assert_allclose(got.numpy().ravel(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "offset", "rows"),
    [
        (0.5, 0.0, {0, 1, 2, 3, 4}), (0.3, 0.2, {2, 3, 4}), (0.5, 0.7, {7, 8, 9, 0, 1}), (1.0, 0.0, set(range(10))),
        (0.0, 0.4, set()), (-0.2, 0.2, {0, 1}), (3.0, 0.0, set(range(10))), (0.2, -0.1, {9, 0}), (0.2, 1.3, {3, 4}),
    ],
)  # fmt: skip
def test_rows_of_b(width: float, offset: float, rows: set[int]) -> None:
    got = methods.tensor_sum(torch.zeros(10, 2), torch.ones(10, 2), width=width, offset=offset)
    assert {i for i in range(10) if got[i, 0] == 1} == rows
    assert torch.equal(got[:, 0], got[:, 1])


def test_ranks_of_b_with_values_of_a() -> None:
    a, b = torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([10.0, 40.0, 30.0, 20.0])
    assert methods.top_k_tensor_sum(a, b).tolist() == [1.0, 4.0, 3.0, 2.0]
    assert methods.top_k_tensor_sum(a, b, width=0.5).tolist() == [1.0, 1.0, 2.0, 2.0]  # only 1 and 2 move
    x, y = random((7, 8), 1), random((7, 8), 2)
    moved = methods.top_k_tensor_sum(x, y)
    assert torch.equal(moved.flatten().sort().values, x.flatten().sort().values)
    assert torch.equal(moved.flatten().argsort(), y.flatten().argsort())


def test_comparative_interpolation_takes_what_is_near() -> None:
    a = torch.zeros(4000)
    b = torch.linspace(0.001, 1, 4000)
    taken = methods.comparative_interpolation(a, b, place=PLACE, alpha=0.5) != 0
    shares = [taken[i : i + 1000].float().mean().item() for i in range(0, 4000, 1000)]
    for share, want in zip(shares, (0.875, 0.625, 0.375, 0.125), strict=True):
        assert abs(share - want) < 0.06
    likely = (1 - (b / b.max()).double()) ** (1 / 0.25 - 1)
    blended = methods.comparative_interpolation(a, b, place=PLACE, alpha=0.25, gamma=1.0)
    torch.testing.assert_close(blended.double(), likely * b.double(), rtol=1e-5, atol=1e-6)


def test_comparative_interpolation_is_keyed() -> None:
    a, b = random((500,), 1), random((500,), 2)
    one = methods.comparative_interpolation(a, b, place=PLACE, seed=1)
    assert torch.equal(one, methods.comparative_interpolation(a, b, place=PLACE, seed=1))
    assert not torch.equal(one, methods.comparative_interpolation(a, b, place=PLACE, seed=2))
    assert torch.equal(methods.comparative_interpolation(a, b, place=PLACE, alpha=0.0), a)
    assert torch.equal(methods.comparative_interpolation(a, b, place=PLACE, alpha=1.0), b)
