"""Dropout of several changes: what is kept, how often, and its mean, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sdkernels
from sdmerge.method import Place
from sdmerge.methods.dropout import dropout
from tests.sdmerge.methods.calls import PLACE, call, random

OVERLAPS = ("independent", "disjoint", "shared")
COUNT = 40_000


def kept(overlap: str, density: float, models: int = 3) -> np.ndarray:
    """Return which models' elements are kept, [models, COUNT], read from the sum of powers of two."""
    tensors = [torch.full((COUNT,), 4.0**i) for i in range(models)]
    result = dropout(
        *tensors, base=torch.zeros(COUNT), place=PLACE, density=density, alpha=1.0, overlap=overlap, rescale=False
    ).numpy()
    masks = np.zeros((models, COUNT), dtype=bool)
    for bits in range(1, 2**models):
        members = [i for i in range(models) if bits >> i & 1]
        masks[np.ix_(members, np.isclose(result, sum(4.0**i for i in members) / len(members), rtol=1e-6))] = True
    assert ((result == 0) == ~masks.any(0)).all()
    return masks


def test_independent() -> None:
    masks = kept("independent", 0.3)
    np.testing.assert_allclose(masks.mean(1), 0.3, atol=0.012)
    np.testing.assert_allclose((masks[0] & masks[1]).mean(), 0.09, atol=0.008)
    np.testing.assert_allclose(masks.any(0).mean(), 1 - 0.7**3, atol=0.012)


def test_disjoint() -> None:
    masks = kept("disjoint", 0.3)
    assert masks.sum(0).max() == 1
    np.testing.assert_allclose(masks.mean(1), 0.1, atol=0.008)


def test_shared() -> None:
    masks = kept("shared", 0.3)
    assert set(masks.sum(0)) == {0, 3}
    np.testing.assert_allclose(masks.mean(1), 0.3, atol=0.012)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_formula(alpha: float, rescale: bool) -> None:
    *tensors, base = (random((6, 50), seed) for seed in range(4))
    result = dropout(*tensors, base=base, place=PLACE, density=0.25, alpha=alpha, rescale=rescale, seed=5)
    total, count = np.zeros((6, 50)), np.zeros((6, 50))
    for i, x in enumerate(tensors):
        key = sdkernels.philox.key(5, f"{PLACE.name}#{i}")
        mask = sdkernels.philox.uniform(300, key).numpy().reshape(6, 50) < 0.25
        total += mask * (x - base).double().numpy()
        count += mask
    change = alpha * total / np.maximum(count, 1) / (0.25 if rescale else 1)
    np.testing.assert_allclose(result.numpy(), base.double().numpy() + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_one_model_is_dare(overlap: str) -> None:
    x, base = random((500,), 1), random((500,), 2)
    result = call("dropout", [x], base, density=0.3, alpha=1.0, overlap=overlap)
    if overlap == "independent":
        torch.testing.assert_close(result, call("dare_linear", [x], base, density=0.3))
    share = ((result - base).abs() > 1e-6).float().mean().item()
    assert 0.2 < share < 0.4


@pytest.mark.parametrize("overlap", ["disjoint", "shared"])
def test_the_expected_value_stays(overlap: str) -> None:
    tensors = [torch.full((COUNT,), float(i)) for i in range(1, 4)]
    result = call("dropout", tensors, torch.zeros(COUNT), density=0.4, alpha=1.0, overlap=overlap)
    assert abs(result.mean().item() - 2) < 0.05


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_nothing_and_everything(overlap: str) -> None:
    *tensors, base = (random((100,), seed) for seed in range(4))
    assert torch.equal(call("dropout", tensors, base, density=0.0, overlap=overlap), base)
    everything = call("dropout", tensors, base, density=1.0, alpha=1.0, overlap=overlap)
    if overlap == "disjoint":  # each element is one model's
        assert torch.stack([(everything - x).abs() < 1e-5 for x in tensors]).any(0).all()
    else:
        torch.testing.assert_close(everything, sum(tensors) / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_blocks_are_parts_of_the_whole(overlap: str) -> None:
    *tensors, base = (random((1000,), seed) for seed in range(4))
    whole = call("dropout", tensors, base, density=0.3, overlap=overlap)
    parts = [
        dropout(
            *(x[start : start + 301] for x in tensors), base=base[start : start + 301],
            place=Place(PLACE.name, start), density=0.3, overlap=overlap,
        )
        for start in range(0, 1000, 301)
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(call("dropout", tensors, base, density=0.3, overlap=overlap, seed=1), whole)
