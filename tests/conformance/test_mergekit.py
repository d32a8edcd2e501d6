"""Agreement with mergekit 0.1.5: its own methods on the same tensors, float32, within 1e-5. Run by `make conformance`.

Random methods draw other numbers than mergekit does, so it is given ours; and it restores the sum of |Δ| where we divide by
the probability, so that both leave the kept values as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdkernels
from sdmerge.method import Place, find

pytest.importorskip("mergekit", reason="mergekit is not installed; make conformance does that")
registry: Any = pytest.importorskip("mergekit.merge_methods.registry")
base_classes: Any = pytest.importorskip("mergekit.merge_methods.base")

PLACE = Place("layers.0.weight")
NEAR = 1e-5
SHAPES = ((64,), (24, 17), (8, 5, 3, 3))
WEIGHTS = (1.0, 0.6, 0.35)


def models(shape: tuple[int, ...], count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return models that share half of what they learned, and their base."""
    source = torch.Generator().manual_seed(sum(shape))
    base, lean, *own = (torch.randn(shape, generator=source) for _ in range(count + 2))
    return [base + 0.3 * (lean + x) for x in own], base


def theirs(name: str, tensors: list[torch.Tensor], base: int | None = None, **parameters: Any) -> torch.Tensor:
    """Run mergekit's method; `base` is the index of the base model among the tensors."""
    group = base_classes.TensorGroup.from_tensors(tensors, base_index=base, name=PLACE.name)
    (result,) = registry.get(name)([group], parameters=parameters, dtype=torch.float32)
    return result


def ours(name: str, tensors: list[torch.Tensor], base: torch.Tensor | None = None, **values: Any) -> torch.Tensor:
    """Run our method as the runner does."""
    method = find(name)
    extra: dict[str, Any] = {} if base is None else {"base": base}
    if method.takes_place:
        extra["place"] = PLACE
    return method.function(*tensors, **extra, **method.check(len(tensors), values))


def apart(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the larger of two distances: of the whole tensors, over their norm, and of any element, over 1 + its size."""
    assert result.shape == expected.shape
    difference = result - expected
    whole, most = difference.norm() / expected.norm(), (difference.abs() / (1 + expected.abs())).max()
    return float(torch.stack([whole, most]).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(shape: tuple[int, ...], normalize: bool) -> None:
    tensors, _ = models(shape, 3)
    expected = theirs("linear", tensors, weight=WEIGHTS, normalize=normalize)
    assert apart(ours("linear", tensors, weights=WEIGHTS, normalize=normalize), expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp(shape: tuple[int, ...], t: float) -> None:
    tensors, _ = models(shape, 2)
    assert apart(ours("slerp", tensors, t=t), theirs("slerp", tensors, 0, t=t)) < NEAR
    near = [tensors[0], tensors[0] + 0.01 * tensors[1]]  # a straight line in both
    assert apart(ours("slerp", near, t=t), theirs("slerp", near, 0, t=t)) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
def test_nuslerp(shape: tuple[int, ...], based: bool, flatten: bool, row_wise: bool) -> None:
    tensors, base = models(shape, 2)
    given = [base, *tensors] if based else tensors
    expected = theirs(
        "nuslerp", given, 0 if based else None, weight=(0.3, 0.9), nuslerp_flatten=flatten, nuslerp_row_wise=row_wise
    )
    result = ours("nuslerp", tensors, base if based else None, weights=(0.3, 0.9), flatten=flatten, row_wise=row_wise)
    assert apart(result, expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_multislerp(shape: tuple[int, ...], based: bool, normalize: bool) -> None:
    tensors, base = models(shape, 3)
    given = [base, *tensors] if based else tensors
    expected = theirs("multislerp", given, 0 if based else None, weight=WEIGHTS, normalize_weights=normalize)
    result = ours("multislerp", tensors, base if based else None, weights=WEIGHTS, normalize=normalize)
    assert apart(result, expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_karcher(shape: tuple[int, ...]) -> None:
    tensors, _ = models(shape, 4)
    assert apart(ours("karcher", tensors), theirs("karcher", tensors)) < NEAR
    assert apart(ours("karcher", tensors, iterations=2), theirs("karcher", tensors, max_iter=2)) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(shape: tuple[int, ...], normalize: bool) -> None:
    tensors, base = models(shape, 3)
    expected = theirs("task_arithmetic", [base, *tensors], 0, weight=WEIGHTS, normalize=normalize, **{"lambda": 0.7})
    assert apart(ours("task_arithmetic", tensors, base, weights=WEIGHTS, lam=0.7, normalize=normalize), expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 1.0])
def test_ties(shape: tuple[int, ...], normalize: bool, density: float) -> None:
    tensors, base = models(shape, 3)
    expected = theirs(
        "ties", [base, *tensors], 0, weight=WEIGHTS, density=density, normalize=normalize, **{"lambda": 0.7}
    )
    result = ours("ties", tensors, base, weights=WEIGHTS, density=density, lam=0.7, normalize=normalize)
    assert apart(result, expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.8, 0.5), (1.0, 0.1), (0.0, 0.1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_breadcrumbs(shape: tuple[int, ...], name: str, density: float, gamma: float, normalize: bool) -> None:
    tensors, base = models(shape, 3)
    expected = theirs(
        name, [base, *tensors], 0, weight=WEIGHTS, density=density, gamma=gamma, normalize=normalize, **{"lambda": 0.7}
    )
    values = {"weights": WEIGHTS, "density": density, "gamma": gamma, "lam": 0.7, "normalize": normalize}
    assert apart(ours(name, tensors, base, **values), expected) < NEAR


@pytest.fixture
def our_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make mergekit keep the elements that we keep, model by model."""
    model = iter(range(100))

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        key = sdkernels.philox.key(3, f"{PLACE.name}#{next(model)}")
        numbers = sdkernels.philox.uniform(chances.numel(), key).reshape(chances.shape)
        return (numbers < chances).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.usefixtures("our_numbers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dare(shape: tuple[int, ...], name: str, normalize: bool) -> None:
    tensors, base = models(shape, 3)
    expected = theirs(
        name, [base, *tensors], 0, weight=WEIGHTS, density=0.6, normalize=normalize, rescale=False, **{"lambda": 0.7}
    )
    values = {"weights": WEIGHTS, "density": 0.6, "lam": 0.7, "normalize": normalize, "rescale": False, "seed": 3}
    assert apart(ours(name, tensors, base, **values), expected) < NEAR


@pytest.mark.usefixtures("our_numbers")
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)  # convolutions are ranked along another dimension
@pytest.mark.parametrize("name", ["della_linear", "della"])
@pytest.mark.parametrize("normalize", [False, True])
def test_della(shape: tuple[int, ...], name: str, normalize: bool) -> None:
    tensors, base = models(shape, 3)
    shared: dict[str, Any] = {"density": 0.6, "epsilon": 0.2, "normalize": normalize, "rescale": False}
    expected = theirs(name, [base, *tensors], 0, weight=WEIGHTS, **shared, **{"lambda": 0.7})
    assert apart(ours(name, tensors, base, weights=WEIGHTS, lam=0.7, seed=3, **shared), expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(shape: tuple[int, ...], count: int) -> None:
    tensors, base = models(shape, count)
    assert apart(ours("model_stock", tensors, base), theirs("model_stock", [base, *tensors], 0)) < NEAR


@pytest.mark.parametrize(
    "shape", SHAPES[:2], ids=str
)  # convolutions have one ratio for each row of their last dimension
def test_model_stock_by_filter(shape: tuple[int, ...]) -> None:
    tensors, base = models(shape, 3)
    expected = theirs("model_stock", [base, *tensors], 0, filter_wise=True)
    assert apart(ours("model_stock", tensors, base, filter_wise=True), expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_sce(shape: tuple[int, ...], share: float) -> None:
    tensors, base = models(shape, 3)
    expected = theirs("sce", [base, *tensors], 0, select_topk=share)
    assert apart(ours("sce", tensors, base, select_topk=share), expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", [0.001, 0.1, 0.5])
def test_nearswap(shape: tuple[int, ...], t: float) -> None:
    tensors, _ = models(shape, 2)
    assert apart(ours("nearswap", tensors, t=t), theirs("nearswap", tensors, 0, t=t)) < NEAR


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)  # convolutions have their softmax over the last dimension
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    tensors, base = models(shape, 1)
    result = ours("arcee_fusion", tensors, base)
    assert not torch.equal(result, base)
    assert apart(result, theirs("arcee_fusion", [base, *tensors], 0)) < NEAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ram(shape: tuple[int, ...]) -> None:
    tensors, base = models(shape, 3)
    assert apart(ours("ram", tensors, base, epsilon=0.2), theirs("ram", [base, *tensors], 0, epsilon=0.2)) < NEAR
    for alpha in (0.2, 50.0):
        expected = theirs("ramplus_tl", [base, *tensors], 0, epsilon=0.2, r=0.5, alpha=alpha)
        assert apart(ours("ram_plus", tensors, base, epsilon=0.2, r=0.5, alpha=alpha), expected) < NEAR
