"""Cosine methods against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdmerge.methods.cosine import cosine_a, cosine_b
from tests.sdmerge.methods.calls import random


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(20,), (6, 5), (4, 3, 3, 3)])
def test_formulas(shape: tuple[int, ...], alpha: float) -> None:
    x = random(shape, 1)
    y = x + 0.5 * random(shape, 2)
    a, b = x.double().numpy(), y.double().numpy()
    columns = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    overall = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    for method, alike in ((cosine_a, columns), (cosine_b, (columns + overall) / 2)):
        share = 1 - np.clip(alike - alpha, 0, 1)
        np.testing.assert_allclose(method(x, y, alpha=alpha).numpy(), a + share * (b - a), rtol=1e-5, atol=1e-6)


def test_a_zero_vector_resembles_nothing() -> None:
    zero, y = torch.zeros(6, 2), random((6, 2), 3)
    assert torch.equal(cosine_a(zero, y, alpha=0.0), y)
    assert torch.equal(cosine_b(zero, y, alpha=0.0), y)
    assert torch.equal(cosine_a(y, zero, alpha=0.0), zero)
