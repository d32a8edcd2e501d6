"""Approximations of one layer's change: factors, and Tucker's form, with the bounds that they carry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdformats.tensor import DType
from sdmerge.lora.decompose import Core, flattened, singular_values, tucker, tucker_curve
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from sdmerge.lora.shrink import Form
from tests.sdmerge.lora.records import numbers

SHAPES = [(24, 20, 3, 3), (40, 12, 3, 3), (11, 30, 3, 3), (13, 14, 2, 3), (200, 10, 3, 3)]


def store(half: Tensor) -> Tensor:
    return half


def made(found: Core, shape: tuple[int, ...]) -> Tensor:
    """Return the change that a core makes, by the record that it becomes."""
    form = Form(rows=shape[0], inner=shape[1:], dtype=DType.F32, tucker=True)
    return delta(found.lora(form, found.most), lambda ref: value(ref).double())


def of_rank(shape: tuple[int, ...], rank: int) -> Tensor:
    """Return a change that Tucker's form of a rank holds."""
    up, mid, down = numbers(1, shape[0], rank), numbers(2, rank, rank, *shape[2:]), numbers(3, rank, shape[1])
    return torch.einsum("om,mnhw,ni->oihw", up, mid, down)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_of_that_form_comes_back(shape: tuple[int, ...]) -> None:
    change = of_rank(shape, 4)
    found = tucker(change, 4, "layer", 0.01, store)
    assert (made(found, shape) - change).norm() <= 2e-5 * change.norm()
    assert found.error(4) <= 1e-3
    assert found.excess == 0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] == shape[3]])  # LyCORIS knows no others
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_core_is_no_worse_than_lycoris_makes_it_and_the_bound_holds(shape: tuple[int, ...], rank: int) -> None:
    utils = pytest.importorskip("lycoris.utils")
    change = of_rank(shape, 9) + numbers(4, *shape, spread=0.3)
    found = tucker(change, rank, "layer", 0.0, store)
    error = (made(found, shape) - change.double()).norm()
    assert float(error / change.norm()) == pytest.approx(found.error(rank), abs=1e-5)
    # What LyCORIS does: the factors of the flattened convolution, then those of its down, the other way round.
    (down, up, _), _ = utils.extract_conv(change, "fixed", rank, "cpu", True)
    (mid, inner, _), _ = utils.extract_conv(down.transpose(0, 1), "fixed", rank, "cpu", True)
    theirs = torch.einsum("om,mnhw,ni->oihw", up.flatten(1), mid.transpose(0, 1), inner.flatten(1).T)
    assert error <= (theirs - change).norm() * (1 + 1e-6)
    # No core keeps more than the best matrix of its rank, whichever side's.
    sides = (change, change.transpose(0, 1))
    least = max(float(torch.linalg.svdvals(side.flatten(1).double())[rank:].norm()) for side in sides)
    assert error >= least * (1 - 1e-6)
    assert 1 + found.excess == pytest.approx(float(error) / least, rel=1e-3)


def test_a_curve_is_what_truncated_cores_keep() -> None:
    change = of_rank((24, 20, 3, 3), 6) + numbers(4, 24, 20, 3, 3, spread=0.3)
    kept = tucker_curve(change).square().cumsum(0)
    assert kept.numel() == 19
    for rank in (1, 5, 12, 19):
        best = tucker(change, rank, "layer", 0.0, store).square
        assert 0.9 * best <= float(kept[rank - 1]) <= best * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 8, 3, 3)])
def test_factors_are_those_of_the_svd(shape: tuple[int, ...]) -> None:
    change = numbers(5, *shape)
    sigma = torch.linalg.svdvals(change.flatten(1).double())
    found = flattened(change, 5, "layer", 0.01, store)
    assert float((found.up.double() @ found.down.double() - change.flatten(1)).norm()) == pytest.approx(
        float(sigma[5:].norm()), rel=1e-4
    )
    assert torch.allclose(found.squares.sqrt(), sigma[:5], rtol=1e-3)
    assert torch.allclose(singular_values(change), sigma, atol=1e-3 * float(sigma[0]))
    assert torch.allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-3)


def test_the_three_parts_of_a_core_are_of_like_size() -> None:
    """So that float16 holds all of them."""
    found = tucker(1e-4 * of_rank((24, 20, 3, 3), 5), 5, "layer", 0.01, store)
    for part in (found.up, found.mid, found.down):
        assert 1e-3 < float(part.abs().max()) < 10
