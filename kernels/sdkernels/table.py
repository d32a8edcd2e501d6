"""Many layers in one launch: a table of their addresses, and programs that go from tile to tile of all of them.

A model has a thousand layers, and most take a GPU a few microseconds: a launch for each would take as long again. So as many
programs as the GPU runs at once stay, and take tile after tile of the whole table.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.cast import accumulator, narrow
from sdkernels.dot import widened
from sdkernels.kernel import programs_of, tl, triton
from sdkernels.philox import Key, seed_of
from sdkernels.rounding import by_chance, form_of, stochastic, store_bits

_FIELDS = 9
_TYPES = {torch.float16, torch.bfloat16, torch.float32}
_NEAREST = ((0, 0, 0, 1.0, 1.0), 0, False)


class Layer(NamedTuple):
    """A weight that something is added to.

    Attributes:
        weight: [rows, columns], contiguous, any floating type.
        out: where to round the result to, once: of its shape, contiguous, any floating type; the weight itself, or other memory.
        parts: what is added, as the kernel takes it.
        key: random numbers to round by; None rounds to nearest.
    """

    weight: Tensor
    out: Tensor
    parts: tuple[Any, ...]
    key: Key | None = None


def rounded(value: Tensor, layer: Layer) -> Tensor:
    """Round a layer's result, in float32 or float64, into its output."""
    return narrow(value, layer.out) if layer.key is None else stochastic(value, layer.out, layer.key)


def summed(
    layers: Sequence[Layer],
    factors: Callable[[Any], tuple[Tensor, ...]],
    add: Callable[[Tensor, Any, tuple[Tensor, ...]], object],
) -> tuple[Tensor, ...]:
    """Return each layer's output, after rounding the sum of its weight and its parts into it: what kernels are compared with.

    Args:
        layers: any; sums are in float32 (float64 where an input is).
        factors: returns the tensors of a part.
        add: adds to the rows of a sum that a part is on [rows, columns] the part, whose tensors it gets in the sum's type.
    """
    for layer in layers:
        wide = accumulator(layer.weight.dtype, *(x.dtype for part in layer.parts for x in factors(part)))
        total = layer.weight.to(wide, copy=True)
        for part in layer.parts:
            add(total[part.first :], part, tuple(x.to(wide) for x in factors(part)))
        rounded(total, layer)
    return tuple(layer.out for layer in layers)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def locate(layers, owner, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile's layer (its number, and its row of the table), and the tile's rows and columns, int64.

    A row holds the addresses of weight and output, rows, columns, first tile, tiles side by side, first part, number of parts
    and random seed.
    """
    index = tl.load(owner + tile)
    layer = layers + index.to(tl.int64) * 9
    across = tl.load(layer + 5)
    local = tile - tl.load(layer + 4)
    i = (local // across) * ROWS + tl.arange(0, ROWS)
    j = (local % across) * COLUMNS + tl.arange(0, COLUMNS)
    return index, layer, i, j


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def elements(layer, i, j, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where a tile's elements are in the weight, and which of them exist."""
    rows, columns = tl.load(layer + 2), tl.load(layer + 3)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    return i[:, None] * columns + j[None, :], (i < rows)[:, None] & (j < columns)[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def address(place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the pointer that a table holds."""
    pointer = tl.load(place).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def weight_of(layer, at, inside, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile of the weight, as it is stored."""
    return tl.load(address(layer, WEIGHT, ALIGNED) + at, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store(  # type: ignore[no-untyped-def]
    layer, at, inside, value, largest, last, tiny, per_step, step,
    OUT: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Round a tile, to nearest or (where CUT is not 0) by chance, and write it."""
    place = address(layer + 1, OUT, ALIGNED) + at
    if CUT:
        counter = at // 4
        zero = tl.zeros_like(counter).to(tl.uint32)
        seed = tl.load(layer + 8)
        w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
        which = at % 4
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
        bits = by_chance(value, words, largest, last, tiny, per_step, step, CUT)
        store_bits(place, bits, inside, HALVED)
    else:
        tl.store(place, value.to(OUT), mask=inside)


class Group(NamedTuple):
    """Layers that can share a launch.

    Attributes:
        layers: with weights, outputs and factors in types that a kernel takes.
        factor: the type of their factors.
        aligned: whether all rows of all tensors begin at multiples of 16 bytes.
    """

    layers: list[Layer]
    factor: torch.dtype
    aligned: bool


class Table(NamedTuple):
    """What a launch over a group takes.

    Attributes:
        layers: int64 [layers, 9]; see `locate`.
        owner: int32 [tiles], each tile's layer.
        programs: how many to start.
        numbers: how to round by chance; see `rounding.Form`.
        types: the launch's constants WEIGHT, FACTOR, OUT, CUT, HALVED, ALIGNED and WIDENED.
    """

    layers: Tensor
    owner: Tensor
    programs: int
    numbers: tuple[int, int, int, float, float]
    types: dict[str, Any]


def table(group: Group, counts: Sequence[int], rows: int, columns: int) -> Table:
    """Return the table of layers that have so many parts each, with tiles of `rows` by `columns`."""
    layers = group.layers
    across = [triton.cdiv(layer.weight.shape[1], columns) for layer in layers]
    tiles = [side * triton.cdiv(layer.weight.shape[0], rows) for side, layer in zip(across, layers, strict=True)]
    tiles_before, parts_before = [0, *accumulate(tiles)], [0, *accumulate(counts)]
    entries = [
        (
            layer.weight.data_ptr(), layer.out.data_ptr(), *layer.weight.shape, tiles_before[i], across[i],
            parts_before[i], counts[i], 0 if layer.key is None else seed_of(layer.key),
        )
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    weight, out, device = layers[0].weight.dtype, layers[0].out.dtype, layers[0].weight.device
    by_chance = layers[0].key is not None and out != torch.float32
    numbers, cut, halved = form_of(out) if by_chance else _NEAREST
    types = {"WEIGHT": weight, "FACTOR": group.factor, "OUT": torch.int16 if halved else out}
    constants: dict[str, Any] = {name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in types.items()}
    constants |= {"CUT": cut, "HALVED": halved, "ALIGNED": group.aligned, "WIDENED": widened(group.factor)}
    owner = torch.repeat_interleave(torch.arange(len(layers), dtype=torch.int32), torch.tensor(tiles))
    programs = min(owner.numel(), programs_of(device))
    return Table(torch.tensor(entries, dtype=torch.int64).to(device), owner.to(device), programs, numbers, constants)


def in_groups(
    layers: Iterable[Layer],
    factors: Callable[[Any], tuple[Tensor, ...]],
    laid_out: Callable[[Any, torch.dtype], Any],
    alone: Callable[[Sequence[Layer]], object],
) -> Iterator[Group]:
    """Yield layers in groups, in a fixed order.

    What no kernel takes is widened to float32 first. Outputs that no kernel writes are made in float32, and rounded by torch
    when the caller comes back for the next group.

    Args:
        layers: any.
        factors: returns the tensors of a part.
        laid_out: returns a part with tensors of a type, row after row in memory.
        alone: computes layers that no launch can take: those with float64.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    unfinished: list[tuple[Layer, Tensor]] = []
    for layer in layers:
        found = {x.dtype for part in layer.parts for x in factors(part)}
        if torch.float64 in (layer.weight.dtype, layer.out.dtype, *found):
            alone((layer,))
        elif layer.weight.numel():
            factor = found.pop() if len(found) == 1 and found <= _TYPES else torch.float32
            made = _fitted(layer, tuple(laid_out(part, factor) for part in layer.parts))
            if made.out is not layer.out:
                unfinished.append((layer, made.out))
            tensors = (made.weight, made.out, *(x for part in made.parts for x in factors(part)))
            aligned = all(x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
            kind = (made.weight.dtype, made.out.dtype, layer.key is None, factor, aligned)
            groups.setdefault(kind, Group([], factor, aligned)).layers.append(made)
    yield from groups.values()
    for layer, value in unfinished:
        rounded(value, layer)


def _fitted(layer: Layer, parts: tuple[Any, ...]) -> Layer:
    weight = layer.weight if layer.weight.dtype in _TYPES else layer.weight.float()
    if layer.out.dtype in _TYPES and layer.out.is_contiguous():
        return Layer(weight.contiguous(), layer.out, parts, layer.key)
    return Layer(weight.contiguous(), torch.empty(weight.shape, dtype=torch.float32, device=weight.device), parts)
