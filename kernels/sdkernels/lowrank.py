"""Bake LoRA into weights: W + Σ s (up · down), over a table of layers in one launch.

A tile of the change is summed in float32 over the ranks of all LoRAs, one after the other; then the tile of the weight is read
once, the sum is rounded once, and written. Factors of 16 bits are multiplied as they are, which is exact, and their scale is
applied to each LoRA's sum, so that nothing is rounded on the way.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.dot import dot
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.philox import key
from sdkernels.table import Layer, elements, in_groups, locate, store, summed, table, weight_of

_TILE, _TILE_BY_CHANCE = (128, 128), (64, 64)
_RANK = 64


class Product(NamedTuple):
    """A LoRA on a layer, or on some of its rows.

    Attributes:
        up: [rows of it, rank], any floating type, any strides.
        down: [rank, columns].
        scale: s.
        first: the layer's first row that it is on.
    """

    up: Tensor
    down: Tensor
    scale: float
    first: int = 0


def reference(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Return each layer's output, after rounding W + Σ s (up · down) into it.

    Args:
        layers: whose parts are `Product`s; sums are in float32 (float64 where an input is).
    """
    return summed(layers, _factors, _add)


def _add(total: Tensor, part: Product, factors: tuple[Tensor, ...]) -> None:
    up, down = factors
    total[: up.shape[0]].addmm_(up, down, alpha=part.scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def multiplied(  # type: ignore[no-untyped-def]
    total,
    steps,
    ratios,
    layer,
    i,
    j,
    RANK: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """Return total + Σ s (up · down) for a tile, in units of the last scale.

    A step is some ranks of one LoRA: the addresses of its factors, its rank, the step's first one, and which rows of the layer
    the LoRA is on: the first, and how many. A ratio is what the sum so far is multiplied with: the scale before, over the step's.
    """
    columns, first = tl.load(layer + 3), tl.load(layer + 6)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    for one in range(first, first + tl.load(layer + 7)):
        step = steps + one * 6
        up, down = tl.load(step).to(tl.pointer_type(FACTOR)), tl.load(step + 1).to(tl.pointer_type(FACTOR))
        rank, row = tl.load(step + 2), i - tl.load(step + 4)
        at = tl.multiple_of(tl.load(step + 3), 16) + tl.arange(0, RANK)
        if ALIGNED:
            up, down, rank = tl.multiple_of(up, 16), tl.multiple_of(down, 16), tl.multiple_of(rank, 8)
        here, ranked = (row >= 0) & (row < tl.load(step + 5)), at < rank
        left = tl.load(up + row[:, None] * rank + at[None, :], mask=here[:, None] & ranked[None, :], other=0.0)
        place = down + at[:, None] * columns + j[None, :]
        right = tl.load(place, mask=ranked[:, None] & (j < columns)[None, :], other=0.0)
        total = dot(left, right, total * tl.load(ratios + one), WIDENED)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _bake_kernel(  # type: ignore[no-untyped-def]
    layers, steps, ratios, units, owner, tiles, largest, last, tiny, per_step, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index, layer, i, j = locate(layers, owner, tile, ROWS, COLUMNS)
        at, inside = elements(layer, i, j, ALIGNED)
        stored = weight_of(layer, at, inside, WEIGHT, ALIGNED)  # asked for first: it comes while ranks are summed
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        total = multiplied(total, steps, ratios, layer, i, j, RANK, FACTOR, ALIGNED, WIDENED)
        value = tl.fma(total, tl.zeros_like(total) + tl.load(units + index), stored.to(tl.float32))
        store(layer, at, inside, value, largest, last, tiny, per_step, step, OUT, CUT, HALVED, ALIGNED)


def fast(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Do what `reference` does: one launch for all layers that share the types of weight, output and factors."""
    for group in in_groups(layers, _factors, laid_out, reference):
        rows, columns = _TILE if group.layers[0].key is None else _TILE_BY_CHANCE  # random numbers take registers
        ranks = in_steps([layer.parts for layer in group.layers], group.layers[0].weight.device)
        grid = table(group, ranks.counts, rows, columns)
        _bake_kernel[(grid.programs,)](
            grid.layers, ranks.steps, ranks.ratios, ranks.units, grid.owner, grid.owner.numel(), *grid.numbers,
            ROWS=rows, COLUMNS=columns, RANK=ranks.size, **grid.types, num_warps=8,
        )  # fmt: skip
    return tuple(layer.out for layer in layers)


def _factors(part: Product) -> tuple[Tensor, Tensor]:
    return part.up, part.down


def laid_out(part: Product, dtype: torch.dtype) -> Product:
    """Return a product with factors of a type, row after row in memory."""
    return part._replace(up=part.up.to(dtype).contiguous(), down=part.down.to(dtype).contiguous())


class Steps(NamedTuple):
    """What `multiplied` goes through.

    Attributes:
        steps: int64 [steps, 6].
        ratios: float32 [steps].
        units: float32 [layers], what the sums are multiplied with at the end.
        counts: how many steps each layer has.
        size: ranks in a step.
    """

    steps: Tensor
    ratios: Tensor
    units: Tensor
    counts: list[int]
    size: int


def in_steps(layers: Sequence[Sequence[Product]], device: torch.device) -> Steps:
    """Cut the ranks of all layers' products into steps, each layer's in the order of their scales: sums so can only shrink."""
    most = max((part.up.shape[1] for parts in layers for part in parts), default=1)
    size = min(_RANK, max(16, triton.next_power_of_2(most)))
    steps: list[tuple[int, ...]] = []
    ratios: list[float] = []
    units: list[float] = []
    counts: list[int] = []
    for parts in layers:
        before, unit = len(steps), 0.0
        for part in sorted((part for part in parts if part.scale), key=lambda part: abs(part.scale)):
            rank = part.up.shape[1]
            for start in range(0, rank, size):
                steps.append((part.up.data_ptr(), part.down.data_ptr(), rank, start, part.first, part.up.shape[0]))
                ratios.append(unit / part.scale if start == 0 else 1.0)
            unit = part.scale
        units.append(unit)
        counts.append(len(steps) - before)
    rows = torch.tensor(steps, dtype=torch.int64).reshape(-1, 6)
    factors, last = (torch.tensor(values, dtype=torch.float32).to(device) for values in (ratios, units))
    return Steps(rows.to(device), factors, last, counts, size)


def cases() -> Iterable[Case]:
    """Every type in and out, ranks around the tile, parts on some rows, turned factors; sums that are exact in any order."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for name, types, shapes in (
        ("fp16", (half, half, half), (((130, 70), ((4, 0, 130), (65, 100, 30))), ((1, 257), ((16, 0, 1),)))),
        ("bf16-turned", (brain, brain, brain), (((70, 130), ((17, 0, 70),)), ((5, 3), ()), ((0, 8), ((2, 0, 0),)))),
        ("bf16-aligned", (brain, brain, brain), (((136, 64), ((8, 0, 136), (72, 8, 128))),)),
        ("fp32", (single, single, single), (((64, 64), ((1, 0, 64),)),)),
        ("mixed", (half, brain, single), (((33, 129), ((8, 1, 20), (8, 20, 13))),)),
        ("fp8", (torch.float8_e4m3fn, half, torch.float8_e4m3fn), (((40, 20), ((3, 0, 40),)),)),
        ("bf16-chance", (brain, half, brain), (((65, 130), ((4, 0, 65),)), ((3, 7), ((1, 0, 3),)))),
        ("fp16-chance", (single, half, half), (((31, 33), ((4, 0, 31),)),)),
    ):  # fmt: skip
        yield Case(name, partial(_make, types, shapes, "chance" in name, "turned" in name), 0)


def _make(types: Any, shapes: Any, by_chance: bool, turned: bool, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(len(shapes))
    weight, factor, out = types

    def whole(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        shape = (columns, rows) if turned else (rows, columns)
        made = torch.randint(-2, 3, shape, generator=source).to(torch.float32).to(dtype).to(device)
        return made.T if turned else made

    layers = []
    for (rows, columns), parts in shapes:
        products = tuple(
            Product(whole(height, rank, factor), whole(rank, columns, factor), 0.125 * (i + 1), first)
            for i, (rank, first, height) in enumerate(parts)
        )
        values = whole(rows, columns, weight).contiguous()
        empty = torch.empty((rows, columns), dtype=out, device=device)
        layers.append(Layer(values, empty, products, key(rows, "weight") if by_chance else None))
    return (layers,)


_LARGE = 1280


def large(moved: int) -> Case:
    """Layers of 1280 by 1280 in bfloat16 with four LoRAs of rank 128 each, written in place."""
    each = 2 * (2 * _LARGE * _LARGE + 4 * 2 * 128 * _LARGE)
    count = max(1, moved // each)
    return Case("bf16-1280-4x128", partial(_make_large, count), count * each)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    layers = []
    for _ in range(count):
        parts = tuple(Product(normal(_LARGE, 128), normal(128, _LARGE), 0.01) for _ in range(4))
        weight = normal(_LARGE, _LARGE)
        layers.append(Layer(weight, weight, parts))
    return (layers,)


def plain(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Add one LoRA after the other, layer by layer, as tools do."""
    for layer in layers:
        for part in layer.parts:
            layer.weight.add_((part.up.float() @ part.down.float() * part.scale).to(layer.weight.dtype))
    return tuple(layer.weight for layer in layers)


bake = Kernel("lowrank.bake", reference, fast, cases, large, plain)
