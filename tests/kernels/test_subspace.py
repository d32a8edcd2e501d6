"""Leading singular vectors, against whole singular value decompositions."""

from __future__ import annotations

import pytest
import torch

from sdkernels import subspace


def spectrum(decay: str, count: int) -> torch.Tensor:
    """Return singular values that fall off in some way."""
    i = torch.arange(1, count + 1, dtype=torch.float64)
    return {"root": i**-0.5, "inverse": 1 / i, "flat": torch.ones_like(i), "steep": 0.7**i}[decay].float()


def matrix(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """Return a matrix of these singular values."""
    source = torch.Generator().manual_seed(rows + columns)
    left = torch.linalg.qr(torch.randn(rows, values.numel(), generator=source))[0]
    right = torch.linalg.qr(torch.randn(columns, values.numel(), generator=source))[0]
    return (left * values) @ right.T


@pytest.mark.parametrize("decay", ["root", "inverse", "flat", "steep"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 300, 8), (512, 512, 16), (480, 1000, 40)])
def test_the_error_is_within_the_tolerance(decay: str, rows: int, columns: int, rank: int) -> None:
    values = spectrum(decay, rows)
    a = matrix(rows, columns, values)
    start = torch.rand(rows, rank + 32, generator=torch.Generator().manual_seed(1)) - 0.5
    found = subspace.leading(a, rank, start, tolerance=0.01)
    u = found.vectors
    assert torch.allclose(u.T @ u, torch.eye(rank), atol=1e-4)
    best = values[rank:].double().square().sum().sqrt()
    error = (a - u @ (u.T @ a)).double().norm()
    assert error <= best * 1.01 + 1e-3 * float(values[0])
    assert found.total == pytest.approx(float(values.double().square().sum()), rel=1e-4)


def test_the_bound_is_no_less_than_the_optimum() -> None:
    for seed in range(5):
        values = spectrum("root", 450) * (1 + 0.2 * torch.rand(450, generator=torch.Generator().manual_seed(seed)))
        a = matrix(450, 700, values)
        start = torch.rand(450, 52, generator=torch.Generator().manual_seed(seed)) - 0.5
        found = subspace.leading(a, 20, start, tolerance=0.5)
        optimum = float(torch.linalg.svdvals(a.double())[:20].square().sum())
        assert found.method == "subspace"
        assert found.best >= optimum * (1 - 1e-5)
        assert float(found.squares.sum()) <= optimum * (1 + 1e-5)


def test_a_tight_tolerance_costs_no_accuracy() -> None:
    a = matrix(420, 420, spectrum("flat", 420))
    start = torch.rand(420, 42, generator=torch.Generator().manual_seed(2)) - 0.5
    found = subspace.leading(a, 10, start, tolerance=1e-9)
    assert float(found.squares.sum()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("shape", [(3, 3), (5, 40), (1, 7)])
def test_small_matrices_are_decomposed_whole(shape: tuple[int, int]) -> None:
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    found = subspace.leading(a, None)
    assert found.method == "eigen"
    assert torch.allclose(found.squares.sqrt(), torch.linalg.svdvals(a.double()), rtol=1e-3, atol=1e-3)


def test_nothing_is_nothing() -> None:
    found = subspace.leading(torch.zeros(500, 500), 4, torch.rand(500, 36))
    assert found.total == 0
    assert not found.squares.any()


def test_a_gram_matrix_is_symmetric_and_right() -> None:
    a = torch.randn(37, 90, generator=torch.Generator().manual_seed(4))
    g = subspace.gram(a)
    assert torch.equal(g, g.T)
    assert torch.allclose(g, a @ a.T, rtol=1e-4, atol=1e-4)
