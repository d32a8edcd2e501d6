"""Sums, means and single-model methods against plain numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.method import Place
from sdmerge.methods import sums
from tests.sdmerge.methods.calls import random


def three() -> tuple[list[torch.Tensor], list[np.ndarray]]:
    tensors = [random((200,), seed) for seed in range(3)]
    return tensors, [x.double().numpy() for x in tensors]


def assert_near(got: torch.Tensor, want: Any) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.3, 0.6), (1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_sums_of_three(alpha: float, beta: float) -> None:
    (x, y, z), (a, b, c) = three()
    assert_near(sums.triple_sum(x, y, z, alpha=alpha, beta=beta), (1 - alpha - beta) * a + alpha * b + beta * c)
    assert_near(sums.sum_twice(x, y, z, alpha=alpha, beta=beta), (1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c)
    assert_near(sums.weighted_subtraction(x, y, alpha=alpha, beta=beta), (a - alpha * beta * b) / (1 - alpha * beta))


def test_nothing_is_left_to_subtract_from() -> None:
    with pytest.raises(RequestError, match="both 1"):
        sums.weighted_subtraction(torch.ones(1), torch.ones(1), alpha=1.0, beta=1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_steps(alpha: float) -> None:
    (x, y, _), (a, b, _) = three()
    share = alpha**2 * (3 - 2 * alpha)
    assert_near(sums.smoothstep(x, y, alpha=alpha), (1 - share) * a + share * b)
    inverse = 0.5 - math.sin(math.asin(1 - 2 * alpha) / 3)
    assert math.isclose(inverse**2 * (3 - 2 * inverse), alpha, abs_tol=1e-12)
    assert_near(sums.inverse_smoothstep(x, y, alpha=alpha), (1 - inverse) * a + inverse * b)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_geometric_is_the_real_part_of_complex_powers(alpha: float) -> None:
    (x, y, _), (a, b, _) = three()
    assert_near(sums.geometric(x, y, alpha=alpha), (a.astype(complex) ** (1 - alpha) * b.astype(complex) ** alpha).real)


def test_extremes() -> None:
    (x, y, z), arrays = three()
    assert np.array_equal(sums.maximum(x, y, z).double().numpy(), np.maximum.reduce(arrays))
    assert np.array_equal(sums.minimum(x, y, z).double().numpy(), np.minimum.reduce(arrays))


def test_scale() -> None:
    (x, _, _), (a, _, _) = three()
    assert_near(sums.scale(x, alpha=-1.5), -1.5 * a)
    assert torch.equal(sums.scale(x), x)


def test_noise_depends_on_place_and_seed_only() -> None:
    x = torch.zeros(1000)
    whole = sums.plus_random(x, place=Place("w"), alpha=2.0, seed=5)
    halves = [sums.plus_random(x[:333], place=Place("w"), alpha=2.0, seed=5),
              sums.plus_random(x[333:], place=Place("w", 333), alpha=2.0, seed=5)]  # fmt: skip
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, sums.plus_random(x, place=Place("v"), alpha=2.0, seed=5))
    assert not torch.equal(whole, sums.plus_random(x, place=Place("w"), alpha=2.0, seed=6))
    assert abs(whole.std().item() - 2.0) < 0.2
    assert abs(whole.mean().item()) < 0.3
    assert torch.equal(sums.plus_random(x + 3, place=Place("w"), alpha=0.0), x + 3)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "unet.", ""])
@pytest.mark.parametrize(
    ("names", "factor"),
    [
        (("input_blocks.0.0.weight", "conv_in.weight"), 0.98),
        (("input_blocks.0.0.bias", "conv_in.bias"), 1.04),
        (("out.0.weight", "conv_norm_out.weight"), 0.97),
        (("out.0.bias", "conv_norm_out.bias"), 1.06),
        (("out.2.weight", "conv_out.weight"), 0.95),
        (("input_blocks.1.0.in_layers.2.weight", "middle_block.out.0.weight"), 1.0),
    ],
)
def test_adjust_scales_six_tensors(prefix: str, names: tuple[str, str], factor: float) -> None:
    x = random((50,), 1)
    for name in names:
        got = sums.adjust(x, place=Place(prefix + name), detail_in=2.0, detail_out=3.0, detail_out2=5.0, contrast=9.0)
        assert_near(got, factor * x.double().numpy())


def test_adjust_shifts_the_last_bias() -> None:
    x = torch.zeros(4)
    place = Place("model.diffusion_model.out.2.bias")
    got = sums.adjust(x, place=place, contrast=1.0, brightness=3.0, col1=10.0, col2=20.0, col3=30.0)
    assert_near(got, 0.02 * np.array([1.0, -3 + 10 + 30, 1 + 10 - 20, 2 - 20 + 30]))
    got = sums.adjust(x, place=place, brightness=3.0, col1=10.0, col2=20.0, col3=30.0, latent="sdxl")
    assert_near(got, 0.02 * np.array([0.0, 10 - 20 - 30, -20 + 30, 3.0]))
    rest = sums.adjust(
        x[2:], place=Place(place.name, 2), brightness=3.0, col1=10.0, col2=20.0, col3=30.0, latent="sdxl"
    )
    assert torch.equal(rest, got[2:])
