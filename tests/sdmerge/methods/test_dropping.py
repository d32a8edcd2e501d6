"""Dropping methods: with the mask fed in they are task arithmetic or TIES of what is left, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import sdkernels
from sdmerge.errors import RequestError
from sdmerge.method import METHODS, Place
from sdmerge.methods import _shared
from tests.sdmerge.methods.calls import random

if TYPE_CHECKING:
    from collections.abc import Sequence

RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
NAMES = (*RANDOM, "breadcrumbs", "breadcrumbs_ties")
PLACE = Place("blocks.0.weight")
WEIGHTS = (1.0, 0.7, 0.4)


def models(shape: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, list[np.ndarray]]:
    """Return three models, their base, and their differences in float64."""
    base = random(shape, 9)
    tensors = [base + 0.1 * random(shape, seed) for seed in range(3)]
    return tensors, base, [(x - base).double().numpy() for x in tensors]


def uniform(shape: tuple[int, ...], model: int, seed: int = 0) -> np.ndarray:
    """Return the numbers that decide what is dropped."""
    key = sdkernels.philox.key(seed, f"{PLACE.name}#{model}")
    return sdkernels.philox.uniform(int(np.prod(shape)), key).numpy().reshape(shape)


def summed(terms: Sequence[np.ndarray], ties: bool, normalize: bool) -> np.ndarray:
    """Add up weighted terms, or those of the elected sign."""
    weighted = np.stack([w * term for w, term in zip(WEIGHTS, terms, strict=True)])
    weights = np.array(WEIGHTS).reshape(-1, *[1] * terms[0].ndim)
    if not ties:
        return weighted.sum(0) / (weights.sum() if normalize else 1)
    agrees = np.where(weighted.sum(0) >= 0, weighted > 0, weighted < 0)
    share = (weights * agrees).sum(0) if normalize else np.ones(terms[0].shape)
    return np.where(agrees.any(0), (weighted * agrees).sum(0) / np.where(share == 0, 1, share), 0)


def run(name: str, *tensors: torch.Tensor, base: torch.Tensor, **values: Any) -> torch.Tensor:
    extra = {"place": PLACE} if METHODS[name].takes_place else {}
    return METHODS[name].function(*tensors, base=base, **METHODS[name].check(len(tensors), values), **extra)


@pytest.mark.parametrize("shape", [(200,), (12, 31), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_dare(name: str, shape: tuple[int, ...], rescale: bool, normalize: bool) -> None:
    tensors, base, deltas = models(shape)
    density = (0.3, 0.6, 0.9)
    kept = [
        np.where(uniform(shape, i, 5) < p, delta / (p if rescale else 1), 0)
        for i, (delta, p) in enumerate(zip(deltas, density, strict=True))
    ]
    expected = base.double().numpy() + 0.9 * summed(kept, name == "dare_ties", normalize)
    result = run(
        name,
        *tensors,
        base=base,
        weights=WEIGHTS,
        density=density,
        lam=0.9,
        rescale=rescale,
        normalize=normalize,
        seed=5,
    )
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_of_a_block_is_the_block_of_the_whole(name: str) -> None:
    tensors, base, _ = models((101,))
    whole = run(name, *tensors, base=base)
    values = METHODS[name].check(3, {})
    parts = [
        METHODS[name].function(
            *[x[lo : lo + 17] for x in tensors], base=base[lo : lo + 17], place=Place(PLACE.name, lo), **values
        )
        for lo in range(0, 101, 17)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", RANDOM)
def test_masks_depend_on_name_seed_and_model_alone(name: str) -> None:
    base = torch.zeros(64, 8)
    x = torch.ones(64, 8)
    first = run(name, x, base=base)
    assert torch.equal(first, run(name, x, base=base))
    assert not torch.equal(first, run(name, x, base=base, seed=1))
    values = METHODS[name].check(1, {})
    assert not torch.equal(first, METHODS[name].function(x, base=base, place=Place("other"), **values))
    both = run(name, x, x, base=base, normalize=False)
    assert set(both.unique().tolist()) > set(first.unique().tolist())


@pytest.mark.parametrize("name", RANDOM)
def test_density_at_its_ends(name: str) -> None:
    tensors, base, _ = models((12, 31))
    assert torch.equal(run(name, *tensors, base=base, density=0), base)
    torch.testing.assert_close(run(name, tensors[0], base=base, density=1), tensors[0])


def chances(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Return each element's probability, row by row, smallest change first."""
    rows = delta.reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
    result = np.empty(rows.shape)
    for row, into in zip(rows, result, strict=True):
        for rank, at in enumerate(sorted(range(row.size), key=lambda i: (abs(row[i]), i))):
            into[at] = density - epsilon + 2 * epsilon * rank / (row.size - 1)
    return result.reshape(delta.shape)


@pytest.mark.parametrize("shape", [(200,), (12, 31), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["della_linear", "della"])
@pytest.mark.parametrize("normalize", [False, True])
def test_della(name: str, shape: tuple[int, ...], normalize: bool) -> None:
    tensors, base, deltas = models(shape)
    density = (0.3, 0.6, 0.7)
    kept = []
    for i, (delta, share) in enumerate(zip(deltas, density, strict=True)):
        p = chances(delta, share, 0.2)
        kept.append(np.where(uniform(shape, i) < p, delta / p, 0))
    expected = base.double().numpy() + 0.9 * summed(kept, name == "della", normalize)
    result = run(name, *tensors, base=base, weights=WEIGHTS, density=density, epsilon=0.2, lam=0.9, normalize=normalize)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_della_of_many_rows_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, base, _ = models((40, 31))
    whole = run("della", *tensors, base=base)
    monkeypatch.setattr(_shared, "BLOCK", 100)
    assert torch.equal(run("della", *tensors, base=base), whole)


def test_della_without_a_slope_is_dare() -> None:
    tensors, base, _ = models((12, 31))
    della = run("della_linear", *tensors, base=base, epsilon=0)
    torch.testing.assert_close(della, run("dare_linear", *tensors, base=base))


def test_della_refuses_a_density_too_near_the_ends() -> None:
    x = torch.ones(4, 4)
    for density in (0.1, 0.15, 0.9):
        with pytest.raises(RequestError, match=r"density is 0\.\d+ \(expected 0, 1, or more than epsilon, 0\.15"):
            run("della", x, base=x, density=density)


def test_the_expected_change_is_the_whole_change() -> None:
    base = torch.zeros(400, 400)
    x = torch.ones(400, 400)
    for name in RANDOM:
        result = run(name, x, base=base, density=0.4)
        assert result.mean().item() == pytest.approx(1, abs=0.02)  # six deviations


def between(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Drop the largest, then the smallest, until the density is reached."""
    order = np.argsort(np.abs(delta).ravel())
    size = order.size
    kept = int(density * size)
    top = min(int(gamma * size), size - kept)
    mask = np.zeros(size, dtype=bool)
    mask[order[size - top - kept : size - top]] = True
    return np.where(mask.reshape(delta.shape), delta, 0)


@pytest.mark.parametrize("shape", [(200,), (12, 31), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("normalize", [False, True])
def test_breadcrumbs(name: str, shape: tuple[int, ...], normalize: bool) -> None:
    tensors, base, deltas = models(shape)
    density, gamma = (0.3, 0.5, 0.95), (0.1, 0.02, 0.3)
    kept = [between(*given) for given in zip(deltas, density, gamma, strict=True)]
    expected = base.double().numpy() + 0.9 * summed(kept, name == "breadcrumbs_ties", normalize)
    result = run(name, *tensors, base=base, weights=WEIGHTS, density=density, gamma=gamma, lam=0.9, normalize=normalize)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_breadcrumbs_known_answer() -> None:
    x = torch.tensor([10.0, -1.0, 2.0, -3.0, 4.0, 5.0, 0.0, 0.5, 0.25, 0.125])
    result = run("breadcrumbs", x, base=torch.zeros(10), density=0.4, gamma=0.1)
    assert result.tolist() == [0, 0, 2, -3, 4, 5, 0, 0, 0, 0]
    everything = run("breadcrumbs", x, base=torch.zeros(10), density=1, gamma=0.1)
    assert torch.equal(everything, x)
    nothing = run("breadcrumbs", x, base=torch.ones(10), density=0.05)
    assert torch.equal(nothing, torch.ones(10))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_do_not_fit_are_refused(name: str) -> None:
    x = torch.ones(2)
    extra = {"place": PLACE} if name in RANDOM else {}
    function = METHODS[name].function
    with pytest.raises(RequestError, match="1 weights for 2 models"):
        function(x, x, base=x, weights=(1.0,), density=(0.5, 0.5), **extra)
    with pytest.raises(RequestError, match="3 density for 2 models"):
        function(x, x, base=x, weights=(1.0, 1.0), density=(0.5,) * 3, **extra)
