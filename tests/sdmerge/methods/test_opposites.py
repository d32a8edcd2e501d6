"""The methods for opposite changes against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdmerge.methods.opposites import add_opposite, add_strict_opposite, multiply_quotient
from tests.sdmerge.methods.calls import random

ALPHAS = (0.0, 0.6, 1.0)


def three(seed: int = 0) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Return A, B, C with some elements of A or B equal to C's or each other's, and the same in float64."""
    a, b, c = (random((300,), seed + i) for i in range(3))
    a[:10] = c[:10]
    b[5:20] = c[5:20]
    a[20:30] = b[20:30]
    return [a, b, c], [x.double().numpy() for x in (a, b, c)]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_add_opposite(alpha: float) -> None:
    tensors, (a, b, c) = three()
    divisor = np.abs(a - b) + np.abs(a + b - 2 * c)
    share = 2 * np.abs(a - b) / np.where(divisor == 0, 1, divisor)
    np.testing.assert_allclose(
        add_opposite(*tensors, alpha=alpha).numpy(), a + alpha * share * (b - c), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_add_strict_opposite(alpha: float) -> None:
    tensors, (a, b, c) = three()
    divisor = np.maximum(np.abs(a - c), np.abs(b - c)) ** 2
    share = 2 * np.maximum(0, -(a - c) * (b - c) / np.where(divisor == 0, 1, divisor))
    assert 0.2 < (share > 0).mean() < 0.8
    np.testing.assert_allclose(
        add_strict_opposite(*tensors, alpha=alpha).numpy(), a + alpha * share * (b - c), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_multiply_quotient(alpha: float) -> None:
    tensors, (a, b, c) = three()
    own, ratio = np.log(np.abs(a / c)), np.log(np.abs(b / c))
    divisor = np.maximum(np.abs(own), np.abs(ratio)) ** 2
    power = alpha * np.maximum(0, -own * ratio / np.where(divisor == 0, 1, divisor))
    expected = (a * (b / c).astype(complex) ** power).real
    assert alpha == 0 or 0.2 < (np.abs(expected - a) > 1e-3).mean() < 0.8
    np.testing.assert_allclose(multiply_quotient(*tensors, alpha=alpha).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_known_answers() -> None:
    c, x = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(add_opposite(c, x, c), x)  # only B changed
    assert torch.equal(add_opposite(x, x, c), x)
    assert torch.equal(add_opposite(x, -x, c), -x)  # twice
    assert torch.equal(add_strict_opposite(c, x, c), c)
    assert torch.equal(add_strict_opposite(x, 0.5 * x, c), x)
    assert torch.equal(add_strict_opposite(x, -x, c), -x)
    one = torch.ones(3)
    torch.testing.assert_close(multiply_quotient(2 * one, 0.5 * one, one), one)  # opposite and equally far
    torch.testing.assert_close(multiply_quotient(2 * one, 0.25 * one, one), one)  # farther: A goes back to C
    torch.testing.assert_close(multiply_quotient(4 * one, 0.5 * one, one), 4 * 0.5 ** (0.5 * one))
    assert torch.equal(multiply_quotient(2 * one, 4 * one, one), 2 * one)  # the same direction


def test_multiply_quotient_leaves_zeros() -> None:
    x, zero = random((20,), 1), torch.zeros(20)
    y = random((20,), 2)
    assert torch.equal(multiply_quotient(x, zero, y), x)
    assert torch.equal(multiply_quotient(x, y, zero), x)
    assert torch.equal(multiply_quotient(zero, x, y), zero)


def test_multiply_quotient_of_nearly_equal_models_is_exact() -> None:
    c = random((400,), 1) + 3
    a, b = c + 1e-4 * random((400,), 2), c + 1e-4 * random((400,), 3)
    precise = multiply_quotient(a.double(), b.double(), c.double())
    error = (multiply_quotient(a, b, c).double() - precise).abs() / precise.abs()
    assert error.max() < 1e-7


@pytest.mark.parametrize("method", [add_opposite, add_strict_opposite], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_shows(method: object, bad: float, which: int) -> None:
    tensors = [torch.tensor([1.0]), torch.tensor([-2.0]), torch.tensor([0.5])]
    tensors[which] = torch.tensor([bad])
    assert not torch.isfinite(method(*tensors)).any()  # type: ignore[operator]


def test_small_changes_count_as_large_ones_do() -> None:
    zero, x, y = torch.zeros(50), random((50,), 1), random((50,), 2)
    for method in (add_opposite, add_strict_opposite):
        small = method(1e-25 * x, 1e-25 * y, zero)
        torch.testing.assert_close(1e25 * small, method(x, y, zero), rtol=1e-5, atol=1e-6)
