"""Bake LoKr into weights: W + Σ s (w₁ ⊗ w₂), over a table of layers in one launch.

The Kronecker product is never made: element (i, j) adds s · w₁[i / p, j / q] · w₂[i % p, j % q] for a w₂ of p rows and q columns.
Source: Yeh et al., "Navigating text-to-image customization" (2023, LyCORIS).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.philox import key
from sdkernels.table import Layer, address, elements, in_groups, locate, store, summed, table, weight_of

_TILE = (32, 128)
_LARGE = 1280


class Kronecker(NamedTuple):
    """A LoKr on a layer, or on some of its rows.

    Attributes:
        w1: [a, b], any floating type.
        w2: [p, q]; the layer has a p rows of it and b q columns.
        scale: s.
        first: the layer's first row that it is on.
    """

    w1: Tensor
    w2: Tensor
    scale: float
    first: int = 0


def reference(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Return each layer's output, after rounding W + Σ s (w₁ ⊗ w₂) into it.

    Args:
        layers: whose parts are `Kronecker`s; sums are in float32 (float64 where an input is).
    """
    return summed(layers, _factors, _add)


def _add(total: Tensor, part: Kronecker, factors: tuple[Tensor, ...]) -> None:
    w1, w2 = factors
    made = torch.kron(w1 * part.scale, w2)
    total[: made.shape[0]] += made


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _bake_kernel(  # type: ignore[no-untyped-def]
    layers, parts, scales, owner, tiles, largest, last, tiny, per_step, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """A part is the addresses of its factors, the rows and columns of w₂, the columns of w₁, its first row and its rows."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, layer, i, j = locate(layers, owner, tile, ROWS, COLUMNS)
        at, inside = elements(layer, i, j, ALIGNED)
        total = weight_of(layer, at, inside, WEIGHT, ALIGNED).to(tl.float32)
        first = tl.load(layer + 6)
        for one in range(first, first + tl.load(layer + 7)):
            part = parts + one * 7
            p, q, row = tl.load(part + 2), tl.load(part + 3), i - tl.load(part + 5)
            there = inside & ((row >= 0) & (row < tl.load(part + 6)))[:, None]
            left = (row // p)[:, None] * tl.load(part + 4) + (j // q)[None, :]
            right = (row % p)[:, None] * q + (j % q)[None, :]
            x = tl.load(address(part, FACTOR, ALIGNED) + left, mask=there, other=0.0).to(tl.float32)
            y = tl.load(address(part + 1, FACTOR, ALIGNED) + right, mask=there, other=0.0).to(tl.float32)
            total += x * tl.load(scales + one) * y
        store(layer, at, inside, total, largest, last, tiny, per_step, step, OUT, CUT, HALVED, ALIGNED)


def fast(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Do what `reference` does: one launch for all layers that share the types of weight, output and factors."""
    for group in in_groups(layers, _factors, _laid_out, reference):
        parts = [part for layer in group.layers for part in layer.parts]
        entries = [
            (
                part.w1.data_ptr(), part.w2.data_ptr(), *part.w2.shape, part.w1.shape[1], part.first,
                part.w1.shape[0] * part.w2.shape[0],
            )
            for part in parts
        ]  # fmt: skip
        grid = table(group, [len(layer.parts) for layer in group.layers], *_TILE)
        device = grid.owner.device
        _bake_kernel[(grid.programs,)](
            grid.layers, torch.tensor(entries, dtype=torch.int64).to(device),
            torch.tensor([part.scale for part in parts], dtype=torch.float32).to(device),
            grid.owner, grid.owner.numel(), *grid.numbers, ROWS=_TILE[0], COLUMNS=_TILE[1], **grid.types, num_warps=8,
        )  # fmt: skip
    return tuple(layer.out for layer in layers)


def _factors(part: Kronecker) -> tuple[Tensor, ...]:
    return part[:2]


def _laid_out(part: Kronecker, dtype: torch.dtype) -> Kronecker:
    return part._replace(w1=part.w1.to(dtype).contiguous(), w2=part.w2.to(dtype).contiguous())


def cases() -> Iterable[Case]:
    """Types in and out, factors of every form, parts on some rows, several of them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for name, types, shapes in (
        ("fp16", (half, half, half), (((66, 130), ((3, 5, 0, 66), (11, 13, 33, 33))), ((1, 256), ((1, 256, 0, 1),)))),
        ("bf16-aligned", (brain, brain, brain), (((64, 128), ((8, 16, 0, 64),)), ((8, 8), ()))),
        ("mixed", (single, brain, half), (((33, 40), ((33, 40, 0, 33),)), ((0, 5), ((1, 5, 0, 0),)))),
        ("fp8", (torch.float8_e4m3fn, half, torch.float8_e4m3fn), (((20, 24), ((4, 3, 0, 20),)),)),
        ("fp16-chance", (half, half, half), (((65, 30), ((5, 6, 0, 65),)),)),
    ):  # fmt: skip
        yield Case(name, partial(_make, types, shapes, "chance" in name), 0)


def _make(types: Any, shapes: Any, by_chance: bool, device: torch.device) -> tuple[Any, ...]:
    """Return small whole numbers, whose products and sums are exact."""
    source = torch.Generator().manual_seed(len(shapes))
    weight, factor, out = types

    def whole(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(-3, 4, (rows, columns), generator=source).to(torch.float32).to(dtype).to(device)

    layers = []
    for (rows, columns), parts in shapes:
        made = tuple(
            Kronecker(whole(a, b, factor), whole(height // a, columns // b, factor), 0.125, first)
            for a, b, first, height in parts
        )
        empty = torch.empty((rows, columns), dtype=out, device=device)
        layers.append(Layer(whole(rows, columns, weight), empty, made, key(rows, "weight") if by_chance else None))
    return (layers,)


def large(moved: int) -> Case:
    """Layers of 1280 by 1280 in bfloat16 with a LoKr of factors 8 by 8 and 160 by 160 each, written in place."""
    each = 2 * (2 * _LARGE * _LARGE + 8 * 8 + (_LARGE // 8) ** 2)
    count = max(1, moved // each)
    return Case("bf16-1280-8", partial(_make_large, count), count * each)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    weights = [normal(_LARGE, _LARGE) for _ in range(count)]
    small = _LARGE // 8
    return ([Layer(weight, weight, (Kronecker(normal(8, 8), normal(small, small), 0.01),)) for weight in weights],)


def plain(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Make the Kronecker product whole, layer by layer."""
    for layer in layers:
        for part in layer.parts:
            layer.weight.add_((torch.kron(part.w1.float(), part.w2.float()) * part.scale).to(layer.weight.dtype))
    return tuple(layer.weight for layer in layers)


bake = Kernel("kron.bake", reference, fast, cases, large, plain)
