"""Model stock, SCE, NearSwap and Arcee fusion against plain loops in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sdmerge.methods import _shared
from sdmerge.methods.variance import arcee_fusion, model_stock, nearswap, sce
from tests.sdmerge.methods.calls import random

SHAPES = ((200,), (12, 31), (4, 3, 3, 3))


def models(shape: tuple[int, ...], count: int = 3) -> tuple[list[torch.Tensor], torch.Tensor, list[np.ndarray]]:
    """Return models that lean the same way, their base, and their differences in float64."""
    base, lean = random(shape, 9), random(shape, 8)
    tensors = [base + 0.1 * (random(shape, seed) + lean) for seed in range(count)]
    return tensors, base, [(x - base).double().numpy() for x in tensors]


def ratio(vectors: list[np.ndarray]) -> float:
    """Return model stock's t."""
    pairs = list(itertools.combinations(vectors, 2))
    cos = sum(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs) / len(pairs)
    return len(vectors) * cos / (1 + (len(vectors) - 1) * cos)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_model_stock(shape: tuple[int, ...], count: int) -> None:
    tensors, base, deltas = models(shape, count)
    t = ratio([delta.ravel() for delta in deltas])
    expected = base.double().numpy() + t * sum(deltas) / count
    np.testing.assert_allclose(model_stock(*tensors, base=base).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 31), (4, 3, 3, 3)], ids=str)
def test_model_stock_by_output_channel(shape: tuple[int, ...]) -> None:
    tensors, base, deltas = models(shape)
    expected = base.double().numpy().copy()
    for row in range(shape[0]):
        t = ratio([delta[row].ravel() for delta in deltas])
        expected[row] += t * sum(delta[row] for delta in deltas) / 3
    result = model_stock(*tensors, base=base, filter_wise=True)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_model_stock_of_a_vector_has_one_ratio() -> None:
    tensors, base, _ = models((20,))
    by_row = model_stock(*tensors, base=base, filter_wise=True)
    torch.testing.assert_close(by_row, model_stock(*tensors, base=base))


def test_model_stock_known_angles() -> None:
    base = torch.zeros(2)
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(model_stock(x, y, base=base), base)  # a right angle
    assert torch.equal(model_stock(x, -x, base=base), base)  # they cancel
    torch.testing.assert_close(model_stock(x, 2 * x, base=base), 1.5 * x)  # parallel: the mean
    diagonal = torch.tensor([1.0, 1.0])
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    torch.testing.assert_close(model_stock(x, diagonal, base=base), t * (x + diagonal) / 2)


def test_model_stock_sees_small_differences() -> None:
    base = torch.zeros(50)
    tensors = [1e-6 * (random((50,), seed) + 1) for seed in range(2)]
    large = model_stock(*[1e6 * x for x in tensors], base=base)
    torch.testing.assert_close(1e6 * model_stock(*tensors, base=base), large)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_sce(shape: tuple[int, ...], share: float) -> None:
    tensors, base, deltas = models(shape)
    stack = np.stack(deltas)
    if share < 1:
        spread = stack.var(axis=0)
        chosen = int(round(share * 10) * np.count_nonzero(spread)) // 10
        least = np.sort(spread.ravel())[spread.size - chosen] if chosen else np.inf
        stack = np.where(spread >= least, stack, 0)
    energy = np.square(stack).reshape(3, -1).sum(1)
    weights = (energy / max(energy.sum(), 1e-300)).reshape(3, *[1] * len(shape))
    agrees = np.where(stack.sum(0) >= 0, stack > 0, stack < 0)
    divisor = (agrees * weights).sum(0)
    change = (stack * agrees * weights).sum(0) / np.where(divisor > 0, divisor, 1)
    result = sce(*tensors, base=base, select_topk=share)
    np.testing.assert_allclose(result.numpy(), base.double().numpy() + change, rtol=1e-5, atol=1e-6)


def test_sce_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, base, _ = models((40, 31))
    whole = sce(*tensors, base=base, select_topk=0.5)
    monkeypatch.setattr(_shared, "BLOCK", 100)
    torch.testing.assert_close(sce(*tensors, base=base, select_topk=0.5), whole, rtol=1e-6, atol=1e-7)


def test_sce_of_small_changes_still_weighs_them() -> None:
    base = torch.zeros(2)
    large, small = torch.tensor([2e-4, 2e-4]), torch.tensor([1e-4, 1e-4])
    torch.testing.assert_close(sce(large, small, base=base), (4 * large + small) / 5)


def test_sce_of_models_that_agree() -> None:
    base, x = torch.zeros(5), random((5,), 1)
    assert torch.equal(sce(x, x, x, base=base, select_topk=0.5), base)
    torch.testing.assert_close(sce(x, x, x, base=base), x)
    assert torch.equal(sce(x, x, base=x), x)


def test_nearswap() -> None:
    a = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0])
    b = torch.tensor([0.3, 0.1, 0.2, 1.25, 2.0])
    result = nearswap(a, b, t=0.25)
    torch.testing.assert_close(result, torch.tensor([0.25, 0.1, 0.75, 1.25, 2.0]))
    assert result[1] == b[1]
    gap = (a - b).abs().double()
    weight = (0.25 / gap.clamp(min=1e-6)).clamp(max=1)
    torch.testing.assert_close(result.double(), weight * b + (1 - weight) * a)
    assert torch.equal(nearswap(a, b, t=0.0), a)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    (x, *_), base, _ = models(shape)
    rows = (shape[0] if len(shape) > 1 else 1, -1)
    p, q = (np.exp(v.double().numpy().reshape(rows)) for v in (x, base))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(1, keepdims=True)
    score = (np.abs((x - base).double().numpy().reshape(rows)) * divergence).reshape(shape)
    in_order, last = np.sort(score.ravel()), score.size - 1
    lower, median, upper = (in_order[at * last // 4] for at in (1, 2, 3))
    expected = np.where(score >= median + 1.5 * (upper - lower), x.numpy(), base.numpy())
    result = arcee_fusion(x, base=base)
    assert np.array_equal(result.numpy(), expected)
    assert 0 < (result != base).sum() < 0.3 * score.size


def test_arcee_fusion_never_takes_what_scores_nothing() -> None:
    base = random((5, 1), 1)
    assert torch.equal(arcee_fusion(base + 1, base=base), base)
    assert torch.equal(arcee_fusion(torch.zeros(4, 6), base=torch.ones(4, 6)), torch.ones(4, 6))
