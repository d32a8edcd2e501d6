"""The kernels that bake adapters, against float64; how their tables are made up."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import cast, dora, hadamard, kron, lowrank, philox, rounding, table
from sdkernels.dora import Lengths
from sdkernels.hadamard import Hadamard
from sdkernels.kron import Kronecker
from sdkernels.lowrank import Product
from sdkernels.table import Layer

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KERNELS = [lowrank, hadamard, kron, dora]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def changes(name: str, weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """Return a kernel's parts for a weight of 24 by 18, and the exact result."""
    wide = weight.double()
    if name == "lowrank":
        ups, downs = (
            [normal(24, 3, dtype=dtype), normal(8, 5, dtype=dtype)],
            [normal(r, 18, dtype=dtype) for r in (3, 5)],
        )
        exact = wide + 0.3 * ups[0].double() @ downs[0].double()
        exact[16:24] -= 1.7 * ups[1].double() @ downs[1].double()
        return (Product(ups[0], downs[0], 0.3), Product(ups[1], downs[1], -1.7, 16)), exact
    if name == "hadamard":
        a1, b1, a2, b2 = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((24, 3), (3, 18), (24, 2), (2, 18))))
        return (Hadamard(a1, b1, a2, b2, 0.3),), wide + 0.3 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    if name == "kron":
        w1, w2 = normal(2, 3, dtype=dtype), normal(6, 6, dtype=dtype)
        exact = wide.clone()
        exact[5:17] += 0.3 * torch.kron(w1.double(), w2.double())
        return (Kronecker(w1, w2, 0.3, 5),), exact
    up, down, lengths = normal(24, 3, dtype=dtype), normal(3, 18, dtype=dtype), normal(24).abs()
    merged = wide + 0.5 * up.double() @ down.double()
    turned = merged * (lengths.double() / merged.norm(dim=1))[:, None]
    return (Lengths(Product(up, down, 0.5), lengths, 0.7),), wide + 0.7 * (turned - wide)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__)
def test_one_rounding(module: ModuleType, dtype: torch.dtype) -> None:
    """The result is float64's, rounded once; float32 may be a little off, and what lies at a midpoint goes either way."""
    weight = normal(24, 18, dtype=dtype)
    parts, exact = changes(module.__name__.rpartition(".")[2], weight, dtype)
    out = torch.empty_like(weight)
    (got,) = module.bake([Layer(weight, out, parts)])
    assert got is out
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
        return
    assert (got != exact.to(dtype)).float().mean() < 0.01
    torch.testing.assert_close(got, exact.to(dtype))


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__)
def test_in_place_and_by_chance(module: ModuleType) -> None:
    weight = normal(24, 18, dtype=torch.bfloat16)
    parts, _ = changes(module.__name__.rpartition(".")[2], weight, torch.float16)
    (wide,) = module.bake([Layer(weight, torch.empty(24, 18), parts)])
    want = rounding.stochastic(wide, torch.empty_like(weight), philox.key(3, "x"))
    (got,) = module.bake([Layer(weight, weight, parts, philox.key(3, "x"))])
    assert got is weight
    assert torch.equal(got, want)
    assert not torch.equal(got, cast.narrow(wide, torch.empty_like(weight)))


def test_lengths_of_inputs() -> None:
    """Of a convolution, an input's columns are those of its kernel."""
    weight, up, down, lengths = normal(8, 3 * 9), normal(8, 2), normal(2, 3 * 9), torch.tensor([1.0, 2.0, 3.0])
    (got,) = dora.bake([Layer(weight, torch.empty(8, 27), (Lengths(Product(up, down, 1.0), lengths, 1.0, True),))])
    torch.testing.assert_close(got.reshape(8, 3, 9).transpose(0, 1).reshape(3, -1).norm(dim=1), lengths)


def test_rows_of_zeros_stay() -> None:
    weight = torch.zeros(4, 6)
    part = Lengths(Product(torch.zeros(4, 1), torch.ones(1, 6), 1.0), torch.ones(4))
    (got,) = dora.bake([Layer(weight, torch.empty(4, 6), (part,))])
    assert torch.equal(got, weight)


def grouped(layers: list[Layer]) -> list[table.Group]:
    alone: list[Layer] = []
    groups = list(table.in_groups(layers, lambda part: part[:2], lowrank.laid_out, alone.extend))
    assert sum(len(group.layers) for group in groups) + len(alone) == len([x for x in layers if x.weight.numel()])
    return groups


def layer(weight: torch.dtype, factor: torch.dtype, width: int = 16) -> Layer:
    x = torch.ones((8, width), dtype=weight)
    return Layer(x, x.clone(), (Product(torch.ones((8, 8), dtype=factor), torch.ones((8, width), dtype=factor), 1.0),))


def test_layers_of_the_same_types_share_a_launch() -> None:
    half, brain = torch.float16, torch.bfloat16
    groups = grouped([layer(half, half), layer(brain, half), layer(half, half), layer(half, half, 15)])
    assert [(len(g.layers), g.factor, g.aligned) for g in groups] == [
        (2, half, True),
        (1, half, True),
        (1, half, False),
    ]


def test_factors_of_several_types_are_widened() -> None:
    one = layer(torch.float16, torch.float16)
    more = Product(*(x.bfloat16() for x in one.parts[0][:2]), 1.0)
    (group,) = grouped([one._replace(parts=(*one.parts, more))])
    assert group.factor == torch.float32
    assert {x.dtype for part in group.layers[0].parts for x in part[:2]} == {torch.float32}


def test_float64_is_computed_alone() -> None:
    assert grouped([layer(torch.float64, torch.float32), layer(torch.float32, torch.float64)]) == []


def test_a_table_points_at_tiles_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "tl", SimpleNamespace(float32="fp32"))  # a stand-in's types where Triton does not run
    layers = [layer(torch.float32, torch.float32, width) for width in (16, 40)]
    (group,) = grouped(layers)
    made = table.table(group, [1, 1], 4, 16)
    assert made.owner.tolist() == [0] * 2 + [1] * 6
    assert made.layers[:, 2:8].tolist() == [[8, 16, 0, 1, 0, 1], [8, 40, 2, 3, 1, 1]]
    assert (made.types["WEIGHT"], made.types["CUT"], made.types["ALIGNED"]) == ("fp32", 0, True)
    assert made.layers[:, 0].tolist() == [one.weight.data_ptr() for one in layers]


def test_ranks_go_from_the_smallest_scale_to_the_largest() -> None:
    parts = [
        Product(torch.ones(4, rank), torch.ones(rank, 4), scale) for rank, scale in ((70, 2.0), (3, -0.5), (5, 0.0))
    ]
    made = lowrank.in_steps([parts, []], torch.device("cpu"))
    assert made.size == 64
    assert made.counts == [3, 0]
    assert made.steps[:, 2:4].tolist() == [[3, 0], [70, 0], [70, 64]]
    assert made.ratios.tolist() == [-0.0, -0.25, 1.0]
    assert made.units.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__)
def test_large_case(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", 64)
    case = module.bake.large(1 << 20)
    assert 2**19 < case.moved <= 2**20
    (layers,) = case.make(torch.device("cpu"))
    tensors = {x.data_ptr(): x.nbytes for one in layers for x in flat(one.parts)}
    assert case.moved == sum(tensors.values()) + 2 * sum(one.weight.nbytes for one in layers)
    again = [one._replace(weight=one.weight.clone()) for one in layers]
    module.bake.plain(again)
    for got, one in zip(module.bake(layers), again, strict=True):
        torch.testing.assert_close(got.float(), one.weight.float(), rtol=2e-2, atol=2e-2)


def flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for inner in value for x in flat(inner)] if isinstance(value, tuple) else []
