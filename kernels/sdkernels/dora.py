"""Bake DoRA into weights: W + m ((W + s up · down) f - W), over a table of layers in two launches.

f gives each row of W + s up · down (or each input, over all rows and the kernel) the trained length. The first pass sums squares,
the second makes the same tiles again and writes: the change itself is never written. Source: Liu et al., "DoRA" (2024).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.cast import accumulator
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.lowrank import Product, in_steps, laid_out, multiplied
from sdkernels.philox import key
from sdkernels.table import Group, Layer, elements, in_groups, locate, rounded, store, table, weight_of

_TILE = (64, 128)
_UNBOUNDED = 1 << 30
_LARGE = 1280


class Lengths(NamedTuple):
    """A LoRA whose result has trained lengths: a layer's only part.

    Attributes:
        product: the LoRA, on the whole layer.
        lengths: float32, [rows], or [inputs] where `inputs`.
        strength: m.
        inputs: whether lengths are those of the inputs, each of columns / inputs columns one after the other (a kernel).
    """

    product: Product
    lengths: Tensor
    strength: float = 1.0
    inputs: bool = False


def reference(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Return each layer's output, after rounding W + m ((W + s up · down) f - W) into it.

    A row or input of length 0 has no direction, and stays.

    Args:
        layers: with one `Lengths` each; sums are in float32 (float64 where an input is), those of squares in float64.
    """
    return tuple(_one(layer) for layer in layers)


def _one(layer: Layer) -> Tensor:
    (part,) = layer.parts
    up, down, scale, _ = part.product
    wide = accumulator(layer.weight.dtype, up.dtype, down.dtype)
    weight = layer.weight.to(wide)
    merged = torch.addmm(weight, up.to(wide), down.to(wide), alpha=scale)
    count = part.lengths.numel() if part.inputs else 1
    kernel = weight.shape[1] // count if count else 0
    squares = (merged.double() ** 2).reshape(weight.shape[0], count, kernel).sum((0, 2) if part.inputs else (1, 2))
    found = squares.sqrt()
    factor = torch.where(found > 0, part.lengths.double() / found, 1.0).to(wide)
    factor = factor.repeat_interleave(kernel) if part.inputs else factor[:, None]
    return rounded(weight + part.strength * (merged * factor - weight), layer)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _merged(  # type: ignore[no-untyped-def]
    layer, index, steps, ratios, units, i, j, at, inside,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """Return tiles of W, and of W + s up · down."""
    stored = weight_of(layer, at, inside, WEIGHT, ALIGNED)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = multiplied(total, steps, ratios, layer, i, j, RANK, FACTOR, ALIGNED, WIDENED)
    weight = stored.to(tl.float32)
    return weight, tl.fma(total, tl.zeros_like(total) + tl.load(units + index), weight)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _squares_kernel(  # type: ignore[no-untyped-def]
    layers, steps, ratios, units, trained, owner, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    """Sum the squares of some whole rows, or of some whole columns; float64 between tiles."""
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        index, layer, i, j = locate(layers, owner, block, ROWS, COLUMNS)
        across, along = tl.load(layer + 3), tl.load(layer + 3)
        if INPUTS:
            along = tl.load(layer + 2)
        total = tl.zeros((COLUMNS if INPUTS else ROWS,), dtype=tl.float64)
        for start in range(0, along, ROWS if INPUTS else COLUMNS):
            if INPUTS:
                i = start + tl.arange(0, ROWS)
            else:
                j = start + tl.arange(0, COLUMNS)
            at, inside = elements(layer, i, j, ALIGNED)
            _, merged = _merged(
                layer,
                index,
                steps,
                ratios,
                units,
                i,
                j,
                at,
                inside,
                ROWS,
                COLUMNS,
                RANK,
                WEIGHT,
                FACTOR,
                ALIGNED,
                WIDENED,
            )
            total += tl.sum(tl.where(inside, merged * merged, 0.0), 0 if INPUTS else 1).to(tl.float64)
        sums = tl.load(trained + index * 3 + 1).to(tl.pointer_type(tl.float64))
        if INPUTS:
            tl.store(sums + j, total, mask=j < across)
        else:
            tl.store(sums + i, total, mask=i < tl.load(layer + 2))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _factor(row, at, there):  # type: ignore[no-untyped-def]
    """Return what gives rows or inputs their lengths; a row of `trained` holds both addresses, and the columns of an input."""
    sums, kernel = tl.load(row + 1).to(tl.pointer_type(tl.float64)), tl.load(row + 2)
    total = tl.zeros_like(at).to(tl.float64)
    for one in range(kernel):
        total += tl.load(sums + at * kernel + one, mask=there, other=0.0)
    length = tl.load(tl.load(row).to(tl.pointer_type(tl.float32)) + at, mask=there, other=1.0).to(tl.float64)
    return tl.where(total > 0, length / tl.sqrt(tl.where(total > 0, total, 1.0)), 1.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _bake_kernel(  # type: ignore[no-untyped-def]
    layers, steps, ratios, units, trained, strengths, owner, tiles, largest, last, tiny, per_step, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index, layer, i, j = locate(layers, owner, tile, ROWS, COLUMNS)
        at, inside = elements(layer, i, j, ALIGNED)
        weight, merged = _merged(
            layer, index, steps, ratios, units, i, j, at, inside, ROWS, COLUMNS, RANK, WEIGHT, FACTOR, ALIGNED, WIDENED
        )
        row = trained + index * 3
        if INPUTS:
            factor = _factor(row, j // tl.load(row + 2), j < tl.load(layer + 3))[None, :]
        else:
            factor = _factor(row, i, i < tl.load(layer + 2))[:, None]
        value = weight + (merged * factor - weight) * tl.load(strengths + index)
        store(layer, at, inside, value, largest, last, tiny, per_step, step, OUT, CUT, HALVED, ALIGNED)


def fast(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Do what `reference` does: two launches for all layers that share the types of weight, output and factors."""
    for inputs in (False, True):
        chosen = [layer for layer in layers if layer.parts[0].inputs == inputs]
        for group in in_groups(chosen, _factors, _laid_out, reference):
            _launch(group, inputs=inputs)
    return tuple(layer.out for layer in layers)


def _launch(group: Group, *, inputs: bool) -> None:
    parts = [layer.parts[0] for layer in group.layers]
    device = group.layers[0].weight.device
    wide = [layer.weight.shape[1] if inputs else layer.weight.shape[0] for layer in group.layers]
    sums = [torch.empty(size, dtype=torch.float64, device=device) for size in wide]
    entries = [
        (part.lengths.data_ptr(), mine.data_ptr(), mine.numel() // part.lengths.numel())
        for part, mine in zip(parts, sums, strict=True)
    ]
    trained = torch.tensor(entries, dtype=torch.int64).to(device)
    strengths = torch.tensor([part.strength for part in parts], dtype=torch.float32).to(device)
    ranks = in_steps([(part.product,) for part in parts], device)
    given = (ranks.steps, ranks.ratios, ranks.units, trained)
    constants = {"ROWS": _TILE[0], "COLUMNS": _TILE[1], "RANK": ranks.size, "INPUTS": inputs, "num_warps": 8}
    whole = table(group, ranks.counts, *((_UNBOUNDED, _TILE[1]) if inputs else (_TILE[0], _UNBOUNDED)))
    _squares_kernel[(whole.programs,)](
        whole.layers, *given, whole.owner, whole.owner.numel(), **constants, **whole.types
    )
    grid = table(group, ranks.counts, *_TILE)
    _bake_kernel[(grid.programs,)](
        grid.layers, *given, strengths, grid.owner, grid.owner.numel(), *grid.numbers, **constants, **grid.types
    )


def _factors(part: Lengths) -> tuple[Tensor, ...]:
    return part.product[:2]


def _laid_out(part: Lengths, dtype: torch.dtype) -> Lengths:
    return part._replace(product=laid_out(part.product, dtype), lengths=part.lengths.float().contiguous())


def cases() -> Iterable[Case]:
    """Both axes, kernels, types in and out, rows of zeros; sums that are exact in any order."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for name, types, inputs, shapes in (
        ("fp16-rows", (half, half, half), False, ((70, 130, 4, 1), (1, 257, 17, 1))),
        ("fp16-inputs", (half, half, half), True, ((70, 130, 4, 1), (65, 90, 3, 9))),
        ("bf16-rows-aligned", (brain, brain, brain), False, ((128, 64, 8, 1),)),
        ("bf16-inputs-aligned", (brain, brain, brain), True, ((72, 144, 8, 9), (0, 8, 1, 1))),
        ("mixed-rows", (single, brain, half), False, ((33, 40, 3, 1),)),
        ("fp8-inputs", (torch.float8_e4m3fn, half, torch.float8_e4m3fn), True, ((20, 24, 2, 1),)),
        ("bf16-chance-rows", (half, half, brain), False, ((65, 30, 4, 1),)),
    ):  # fmt: skip
        yield Case(name, partial(_make, types, shapes, inputs, "chance" in name), 0)


def _make(types: Any, shapes: Any, inputs: bool, by_chance: bool, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(len(shapes))
    weight, factor, out = types

    def whole(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(-1, 2, (rows, columns), generator=source).to(torch.float32).to(dtype).to(device)

    layers = []
    for rows, columns, rank, kernel in shapes:
        lengths = torch.rand(columns // kernel if inputs else rows, generator=source).to(device) * 5
        up, down, values = whole(rows, rank, factor), whole(rank, columns, factor), whole(rows, columns, weight)
        up[:1], values[:1] = 0, 0
        part = Lengths(Product(up, down, 0.5), lengths, 0.75, inputs)
        empty = torch.empty((rows, columns), dtype=out, device=device)
        layers.append(Layer(values, empty, (part,), key(rows, "weight") if by_chance else None))
    return (layers,)


def large(moved: int) -> Case:
    """Layers of 1280 by 1280 in bfloat16 with a DoRA of rank 16 each, written in place."""
    each = 2 * (2 * _LARGE * _LARGE + 2 * 16 * _LARGE) + 4 * _LARGE
    count = max(1, moved // each)
    return Case("bf16-1280-16", partial(_make_large, count), count * each)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    layers = []
    for _ in range(count):
        weight = normal(_LARGE, _LARGE)
        part = Lengths(Product(normal(_LARGE, 16), normal(16, _LARGE), 0.01), weight.float().norm(dim=1))
        layers.append(Layer(weight, weight, (part,)))
    return (layers,)


def plain(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Make the merged weight whole, layer by layer."""
    for layer in layers:
        (part,) = layer.parts
        up, down, scale, _ = part.product
        merged = layer.weight.float() + up.float() @ down.float() * scale
        layer.weight.copy_(merged * (part.lengths / merged.norm(dim=1))[:, None])
    return tuple(layer.weight for layer in layers)


bake = Kernel("dora.bake", reference, fast, cases, large, plain)
