"""The spectrum of a product from its factors, against torch's SVD of the product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdmerge.lora.factors import FactoredSpectrum, WholeSpectrum, spectrum_of


def factors(m: int, r: int, n: int, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(m * n + r)
    return torch.randn(m, r) * decay ** torch.arange(r), torch.randn(r, n)


@pytest.mark.parametrize("shape", [(40, 8, 60), (60, 20, 40), (30, 12, 30), (8, 8, 90), (90, 30, 8), (5, 1, 5)])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_equals_the_svd_of_the_product(shape: tuple[int, int, int], decay: float) -> None:
    up, down = factors(*shape, decay)
    expected = torch.linalg.svd(up.double() @ down.double())
    found = spectrum_of(up, down)
    count = found.sigma.numel()
    assert torch.allclose(found.sigma, expected.S[:count], rtol=1e-5, atol=2e-7 * float(expected.S[0]))
    for rank in (1, max(1, count // 2), count):
        best = (expected.U[:, :rank] * expected.S[:rank]) @ expected.Vh[:rank]
        a, b = found.truncated(rank)
        assert (a.double() @ b.double() - best).norm() <= 2e-6 * best.norm()
        assert torch.allclose(a.norm(dim=0), b.norm(dim=1), rtol=1e-4, atol=1e-3)


def test_takes_the_product_only_where_the_rank_is_large() -> None:
    assert isinstance(spectrum_of(*factors(40, 20, 60)), FactoredSpectrum)
    assert isinstance(spectrum_of(*factors(40, 21, 60)), WholeSpectrum)


def test_dependent_columns_and_cancelling_factors() -> None:
    up, down = factors(50, 4, 60)
    twice = spectrum_of(torch.cat([up, up], 1), torch.cat([down, 2 * down]))
    a, b = twice.truncated(8)
    assert torch.allclose(a @ b, 3 * up @ down, atol=1e-4)
    assert int((twice.sigma > 0).sum()) == 4
    assert spectrum_of(torch.cat([up, up], 1), torch.cat([down, -down])).sigma.max() == 0


def test_zeros_give_zeros() -> None:
    for up, down in ((torch.zeros(40, 4), torch.randn(4, 50)), (torch.zeros(6, 4), torch.randn(4, 50))):
        a, b = spectrum_of(up, down).truncated(2)
        assert not a.any()
        assert not b.any()
