"""Bake LoHa into weights: W + Σ s (a₁ b₁) ∘ (a₂ b₂), over a table of layers in one launch.

Both products of a tile are summed in registers and multiplied there, so that neither is ever written. Source: Yeh et al.,
"Navigating text-to-image customization" (2023, LyCORIS), which takes it from Hyeon-Woo et al., "FedPara" (2022).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.dot import dot
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.philox import key
from sdkernels.table import Layer, address, elements, in_groups, locate, store, summed, table, weight_of

_TILE = (64, 64)
_LARGE = 1280


class Hadamard(NamedTuple):
    """A LoHa on a layer, or on some of its rows.

    Attributes:
        a1, a2: [rows of it, rank], any floating type.
        b1, b2: [rank, columns].
        scale: s.
        first: the layer's first row that it is on.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float
    first: int = 0


def reference(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Return each layer's output, after rounding W + Σ s (a₁ b₁) ∘ (a₂ b₂) into it.

    Args:
        layers: whose parts are `Hadamard`s; sums are in float32 (float64 where an input is).
    """
    return summed(layers, _factors, _add)


def _add(total: Tensor, part: Hadamard, factors: tuple[Tensor, ...]) -> None:
    a1, b1, a2, b2 = factors
    total[: a1.shape[0]].addcmul_(a1 @ b1, a2 @ b2, value=part.scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    a, b, rank, row, here, j, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        at = start + tl.arange(0, RANK)
        ranked = at < rank
        left = tl.load(a + row[:, None] * rank + at[None, :], mask=here[:, None] & ranked[None, :], other=0.0)
        place = b + at[:, None] * columns + j[None, :]
        right = tl.load(place, mask=ranked[:, None] & (j < columns)[None, :], other=0.0)
        total = dot(left, right, total, WIDENED)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _bake_kernel(  # type: ignore[no-untyped-def]
    layers, parts, scales, owner, tiles, largest, last, tiny, per_step, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """A part is the addresses of its four factors, both ranks, its first row and how many rows it has."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, layer, i, j = locate(layers, owner, tile, ROWS, COLUMNS)
        at, inside = elements(layer, i, j, ALIGNED)
        total = weight_of(layer, at, inside, WEIGHT, ALIGNED).to(tl.float32)
        columns, first = tl.load(layer + 3), tl.load(layer + 6)
        if ALIGNED:
            columns = tl.multiple_of(columns, 8)
        for one in range(first, first + tl.load(layer + 7)):
            part = parts + one * 8
            row = i - tl.load(part + 6)
            here = (row >= 0) & (row < tl.load(part + 7))
            x = _product(
                address(part, FACTOR, ALIGNED), address(part + 1, FACTOR, ALIGNED), tl.load(part + 4),
                row, here, j, columns, ROWS, COLUMNS, RANK, ALIGNED, WIDENED,
            )  # fmt: skip
            y = _product(
                address(part + 2, FACTOR, ALIGNED), address(part + 3, FACTOR, ALIGNED), tl.load(part + 5),
                row, here, j, columns, ROWS, COLUMNS, RANK, ALIGNED, WIDENED,
            )  # fmt: skip
            total = tl.fma(x * tl.load(scales + one), y, total)
        store(layer, at, inside, total, largest, last, tiny, per_step, step, OUT, CUT, HALVED, ALIGNED)


def fast(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Do what `reference` does: one launch for all layers that share the types of weight, output and factors."""
    for group in in_groups(layers, _factors, _laid_out, reference):
        parts = [part for layer in group.layers for part in layer.parts]
        entries = [
            (*(x.data_ptr() for x in part[:4]), part.a1.shape[1], part.a2.shape[1], part.first, part.a1.shape[0])
            for part in parts
        ]
        most = max((x.shape[1] for part in parts for x in (part.a1, part.a2)), default=1)
        grid = table(group, [len(layer.parts) for layer in group.layers], *_TILE)
        device = grid.owner.device
        _bake_kernel[(grid.programs,)](
            grid.layers, torch.tensor(entries, dtype=torch.int64).to(device),
            torch.tensor([part.scale for part in parts], dtype=torch.float32).to(device),
            grid.owner, grid.owner.numel(), *grid.numbers, ROWS=_TILE[0], COLUMNS=_TILE[1],
            RANK=min(32, max(16, triton.next_power_of_2(most))), **grid.types, num_warps=8,
        )  # fmt: skip
    return tuple(layer.out for layer in layers)


def _factors(part: Hadamard) -> tuple[Tensor, ...]:
    return part[:4]


def _laid_out(part: Hadamard, dtype: torch.dtype) -> Hadamard:
    a1, b1, a2, b2 = (x.to(dtype).contiguous() for x in part[:4])
    return Hadamard(a1, b1, a2, b2, part.scale, part.first)


def cases() -> Iterable[Case]:
    """Types in and out, ranks of two sizes, parts on some rows, several of them; sums that are exact in any order."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for name, types, shapes in (
        ("fp16", (half, half, half), (((70, 130), ((4, 0, 70), (17, 30, 33))), ((1, 257), ((16, 0, 1),)))),
        ("bf16-aligned", (brain, brain, brain), (((128, 64), ((8, 0, 128),)), ((8, 8), ()))),
        ("mixed", (single, brain, half), (((33, 40), ((3, 0, 33),)), ((0, 5), ((1, 0, 0),)))),
        ("fp8", (torch.float8_e5m2, half, torch.float8_e5m2), (((20, 24), ((2, 0, 20),)),)),
        ("bf16-chance", (half, half, brain), (((65, 30), ((4, 0, 65),)),)),
    ):  # fmt: skip
        yield Case(name, partial(_make, types, shapes, "chance" in name), 0)


def _make(types: Any, shapes: Any, by_chance: bool, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(len(shapes))
    weight, factor, out = types

    def whole(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(-1, 2, (rows, columns), generator=source).to(torch.float32).to(dtype).to(device)

    layers = []
    for (rows, columns), parts in shapes:
        made = tuple(
            Hadamard(
                whole(height, rank, factor), whole(rank, columns, factor), whole(height, rank + 1, factor),
                whole(rank + 1, columns, factor), 0.125, first,
            )
            for rank, first, height in parts
        )  # fmt: skip
        empty = torch.empty((rows, columns), dtype=out, device=device)
        layers.append(Layer(whole(rows, columns, weight), empty, made, key(rows, "weight") if by_chance else None))
    return (layers,)


def large(moved: int) -> Case:
    """Layers of 1280 by 1280 in bfloat16 with a LoHa of rank 16 each, written in place."""
    each = 2 * (2 * _LARGE * _LARGE + 4 * 16 * _LARGE)
    count = max(1, moved // each)
    return Case("bf16-1280-16", partial(_make_large, count), count * each)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    layers = []
    for _ in range(count):
        weight, (a1, a2), (b1, b2) = normal(_LARGE, _LARGE), normal(2, _LARGE, 16), normal(2, 16, _LARGE)
        layers.append(Layer(weight, weight, (Hadamard(a1, b1, a2, b2, 0.01),)))
    return (layers,)


def plain(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Make both products whole, layer by layer."""
    for layer in layers:
        for part in layer.parts:
            a1, b1, a2, b2 = (x.float() for x in part[:4])
            layer.weight.add_(((a1 @ b1) * (a2 @ b2) * part.scale).to(layer.weight.dtype))
    return tuple(layer.weight for layer in layers)


bake = Kernel("hadamard.bake", reference, fast, cases, large, plain)
