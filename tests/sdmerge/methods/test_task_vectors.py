"""Task arithmetic, TIES and RAM against plain loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.methods.task_vectors import ram, ram_plus, task_arithmetic, ties
from tests.sdmerge.methods.calls import random

SHAPES = ((200,), (12, 31), (4, 3, 3, 3))


def models(shape: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, list[np.ndarray]]:
    """Return three models, their base, and their differences in float64."""
    base = random(shape, 9)
    tensors = [base + 0.1 * random(shape, seed) for seed in range(3)]
    return tensors, base, [(x - base).double().numpy() for x in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(shape: tuple[int, ...], normalize: bool) -> None:
    tensors, base, deltas = models(shape)
    result = task_arithmetic(*tensors, base=base, weights=(0.5, 1.0, -0.25), lam=0.8, normalize=normalize)
    total = 0.5 * deltas[0] + deltas[1] - 0.25 * deltas[2]
    expected = base.double().numpy() + 0.8 * total / (1.25 if normalize else 1.0)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """Keep the largest changes, as many as the density says."""
    k = 0 if density == 0 else max(1, int(density * delta.size))
    smallest = np.sort(np.abs(delta).ravel())[delta.size - k] if k else np.inf
    return np.where(np.abs(delta) >= smallest, delta, 0.0)


def elected(terms: list[np.ndarray], weights: tuple[float, ...], vote: str, normalize: bool) -> np.ndarray:
    """Add up the terms that have the elected sign, element by element."""
    result = np.zeros(terms[0].shape)
    for at in np.ndindex(result.shape):
        values = [w * term[at] for w, term in zip(weights, terms, strict=True)]
        ballot = sum(values) if vote == "sum" else sum(np.sign(values))
        agreeing = [i for i, v in enumerate(values) if (v > 0 if ballot >= 0 else v < 0)]
        total = sum(values[i] for i in agreeing)
        share = sum(weights[i] for i in agreeing) if normalize else 1.0
        result[at] = total / share if agreeing else 0.0
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("normalize", [False, True])
def test_ties(shape: tuple[int, ...], vote: str, normalize: bool) -> None:
    tensors, base, deltas = models(shape)
    weights, density = (1.0, 0.7, 0.4), (0.2, 0.5, 0.9)
    result = ties(*tensors, base=base, weights=weights, density=density, lam=0.9, normalize=normalize, vote=vote)
    terms = [trimmed(delta, share) for delta, share in zip(deltas, density, strict=True)]
    expected = base.double().numpy() + 0.9 * elected(terms, weights, vote, normalize)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_ties_density_at_its_ends() -> None:
    tensors, base, deltas = models((30,))
    nothing = ties(*tensors, base=base, weights=(1.0,) * 3, density=(0.0,) * 3)
    assert torch.equal(nothing, base)
    one = ties(tensors[0], base=base, weights=(1.0,), density=(0.001,))
    assert (one != base).nonzero().tolist() == [[int(np.abs(deltas[0]).argmax())]]
    all_ = ties(tensors[0], base=base, weights=(1.0,), density=(1.0,))
    torch.testing.assert_close(all_, tensors[0])


def test_ties_keeps_all_that_tie_at_the_threshold() -> None:
    base = torch.zeros(6)
    x = torch.tensor([1.0, -1.0, 1.0, 0.5, 3.0, 0.0])
    result = ties(x, base=base, weights=(1.0,), density=(0.4,))
    assert result.tolist() == [1.0, -1.0, 1.0, 0.0, 3.0, 0.0]


def test_ties_averages_the_models_that_agree() -> None:
    base = torch.zeros(3)
    a, b, c = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-1.0, -1.0, 4.0])
    result = ties(a, b, c, base=base, weights=(1.0,) * 3, density=(1.0,) * 3)
    assert result.tolist() == [2.0, 4.0, 3.0]
    by_count = ties(a, b, c, base=base, weights=(1.0,) * 3, density=(1.0,) * 3, vote="count")
    assert by_count.tolist() == [2.0, -1.0, 3.0]


def test_ties_takes_tensors_as_stored() -> None:
    tensors, base, _ = models((12, 31))
    mixed = [tensors[0].half(), tensors[1].bfloat16(), tensors[2]]
    values: dict[str, Any] = {"weights": (1.0,) * 3, "density": (0.3,) * 3}
    result = ties(*mixed, base=base.half(), **values)
    assert torch.equal(result, ties(*[x.float() for x in mixed], base=base.half().float(), **values))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ram(shape: tuple[int, ...]) -> None:
    tensors, base, deltas = models(shape)
    expected = base.double().numpy().copy()
    for at in np.ndindex(shape):
        changes = [delta[at] for delta in deltas if abs(delta[at]) > 0.08]
        expected[at] += sum(changes) / max(1, len(changes))
    np.testing.assert_allclose(ram(*tensors, base=base, epsilon=0.08).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 50.0])
def test_ram_plus(alpha: float) -> None:
    tensors, base, deltas = models((12, 31))
    tensors[2] = base + 0.3 * (tensors[2] - base)
    deltas[2] = (tensors[2] - base).double().numpy()
    changed = np.stack([np.abs(delta) > 0.08 for delta in deltas])
    number = changed.sum(0)
    expected = base.double().numpy().copy()
    for delta, mask in zip(deltas, changed, strict=True):
        lone, shared = (mask & (number == 1)).sum(), (mask & (number > 1)).sum()
        factor = 1 + 0.5 * min(shared / lone, alpha)
        expected += np.where(mask, delta, 0) * np.where(number == 1, factor, 1 / np.maximum(number, 1))
    result = ram_plus(*tensors, base=base, r=0.5, alpha=alpha, epsilon=0.08)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_ram_plus_without_strength_is_ram() -> None:
    tensors, base, _ = models((12, 31))
    assert torch.equal(ram_plus(*tensors, base=base, r=0.0), ram(*tensors, base=base))


def test_numbers_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(RequestError, match="1 weights for 2 models"):
        task_arithmetic(x, x, base=x, weights=(1.0,))
    with pytest.raises(RequestError, match="add up to 0"):
        task_arithmetic(x, x, base=x, weights=(1.0, -1.0), normalize=True)
    with pytest.raises(RequestError, match="1 density for 2 models"):
        ties(x, x, base=x, weights=(1.0, 1.0), density=(0.2,))
