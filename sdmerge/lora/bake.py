"""Bake adapters into a model: what is added to a tensor.

All changes are taken from the model's own weights and added up in float32, with one rounding at the end. Plain LoRA never
makes its whole difference: ranks of all adapters are put side by side, and rows are multiplied while they are in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from sdformats.adapters.records import Full, LoHa, LoKr, Norm
from sdformats.views import Stored
from sdkernels import cast, linear, native
from sdkernels.packed import pack
from sdmerge.lora.algebra import as_lora
from sdmerge.lora.delta import delta, factors, needs_weight
from sdmerge.whole import fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sdformats.views import Ref
    from sdkernels.packed import Packed, Scaled
    from sdmerge.expression import Change
    from sdmerge.lora.contributions import Contribution
    from sdmerge.whole import Memory


@dataclass(frozen=True)
class Baked:
    """An expression: a model's tensor with adapters added.

    Attributes:
        index: which of the step's reads is the tensor.
        added: what is added to it.
        stored: the adapters' tensors, and which of the step's reads each is.
    """

    index: int
    added: tuple[Contribution, ...]
    stored: tuple[tuple[Stored, int], ...]

    elementwise = False
    propagates = True

    @property
    def room(self) -> int | None:
        """See `sdmerge.expression.InTiles`: factors, as stored and in float32."""
        if not all(one.thin or in_rows(one) for one in self.added):
            return None
        specs = [stored.spec for stored, _ in self.stored]
        return sum(spec.nbytes + torch.float32.itemsize * spec.numel for spec in specs)

    def __call__(self, tensors: Sequence[Tensor], _start: int) -> Tensor:
        """Compute the whole tensor."""
        weight = tensors[self.index].to(cast.accumulator(tensors[self.index].dtype))
        change = torch.empty_like(weight).reshape(weight.shape[0], -1)
        self.prepare(tensors, fresh).fill(change, 0, 0)
        return change.reshape(weight.shape).add_(weight)

    def prepare(self, tensors: Sequence[Tensor], memory: Memory) -> Change:
        """Return what is added; see `sdmerge.expression.InTiles`."""
        weight = tensors[self.index]
        wide = cast.accumulator(weight.dtype)
        read = {stored: tensors[index] for stored, index in self.stored}

        def get(ref: Ref) -> Tensor:
            return torch.as_tensor(ref.evaluate(lambda one: read[one].to(wide), torch)).to(wide)

        def factor(ref: Ref) -> Tensor:
            """What takes no arithmetic stays as it is stored: it is widened when it is put beside others."""
            return (read[ref] if isinstance(ref, Stored) else get(ref)).flatten(1)

        dense = [one for one in self.added if not (one.thin or in_rows(one))]
        used = weight.to(wide) if any(needs_weight(one.record) for one in dense) else None
        total = _dense(dense, get, used, weight.shape)
        return _Changes(
            tuple(_products([one for one in self.added if one.thin], factor, wide, memory)),
            tuple(_others(self.added, get)),
            None if total is None else total.reshape(weight.shape[0], -1),
            any(isinstance(one.record, LoKr) for one in self.added if in_rows(one)),
        )


_Adder = tuple[int, int, "Callable[[Tensor, slice, slice, bool], object]"]
"""First row, the one after the last, and a function that adds some rows (of its own) and columns to a matrix, or fills it."""


@dataclass(frozen=True)
class _Products:
    """LoRAs on the same rows, as one product: their ranks side by side.

    Attributes:
        first, last: the first row, and the one after the last.
        factors: scale, up and down of each.
        wide: the type to multiply in.
        memory: where packed factors come from.
    """

    first: int
    last: int
    factors: list[Scaled]
    wide: torch.dtype
    memory: Memory

    @cached_property
    def packed(self) -> Packed | None:
        """The product as native code takes it; None where there is none for it."""
        return pack(self.factors, self.memory) if self.wide == torch.float32 else None

    @cached_property
    def _joined(self) -> tuple[Tensor, Tensor]:
        """All ups, times their scales, and all downs: widened, scaled and placed in one pass."""
        _, first_up, first_down = self.factors[0]
        rank = sum(up.shape[1] for _, up, _ in self.factors)
        joined_up = first_up.new_empty((first_up.shape[0], rank), dtype=self.wide)
        joined_down = first_down.new_empty((rank, first_down.shape[1]), dtype=self.wide)
        start = 0
        for scale, up, down in self.factors:
            ranks = slice(start, start := start + up.shape[1])
            linear.combine([(scale, up)], joined_up[:, ranks])
            linear.combine([(1.0, down)], joined_down[ranks])
        return joined_up, joined_down

    def add(self, tile: Tensor, rows: slice, columns: slice, fresh: bool) -> None:
        """See `_Adder`."""
        up, down = self._joined
        tile.addmm_(up[rows], down[:, columns], beta=0 if fresh else 1)


@dataclass(frozen=True)
class _Changes:
    """All that is added to one matrix; see `sdmerge.expression.Change`."""

    products: tuple[_Products, ...]
    others: tuple[_Adder, ...]
    total: Tensor | None
    whole_rows: bool

    @cached_property
    def _adders(self) -> list[_Adder]:
        return [*((one.first, one.last, one.add) for one in self.products), *self.others]

    @cached_property
    def _packed(self) -> list[tuple[int, int, Packed]] | None:
        """The products, from the first row to the last; None where native code cannot make all that is added, or not at once."""
        if self.others or self.total is not None:
            return None
        found: list[tuple[int, int, Packed]] = []
        for one in sorted(self.products, key=lambda one: one.first):
            if one.packed is None or (found and one.first < found[-1][1]):
                return None
            found.append((one.first, one.last, one.packed))
        return found

    def fill(self, tile: Tensor, row: int, column: int) -> None:
        """See `Change`."""
        bottom, right = row + tile.shape[0], column + tile.shape[1]
        found = [one for one in self._adders if max(one[0], row) < min(one[1], bottom)]
        fills = bool(found) and found[0][0] <= row and bottom <= found[0][1]
        if not fills:
            tile.zero_()
        for number, (first, last, add) in enumerate(found):
            low, high = max(first, row), min(last, bottom)
            part = tile[low - row : high - row]
            add(part, slice(low - first, high - first), slice(column, right), fills and number == 0)
        if self.total is not None:
            tile += self.total[row:bottom, column:right]

    def add(self, stored: Tensor, out: Tensor, row: int) -> bool | None:
        """See `Change`."""
        bottom = row + stored.shape[0]
        if self._packed is None or not (native.serves(stored.dtype) and native.serves(out.dtype)):
            return None
        fine, at = True, row
        for first, last, packed in self._packed:
            low, high = max(first, row), min(last, bottom)
            if low >= high:
                continue
            fine &= _unchanged(stored[at - row : low - row], out[at - row : low - row])
            fine &= packed.add(stored[low - row : high - row], out[low - row : high - row], low - first)
            at = high
        return fine & _unchanged(stored[at - row :], out[at - row :])


def _unchanged(stored: Tensor, out: Tensor) -> bool:
    return not stored.numel() or bool(native.combine_into([(1.0, stored)], out))


def in_rows(one: Contribution) -> bool:
    """Whether a change is no product of two factors, but any of its rows can be made alone."""
    record = one.record
    plain = record.magnitude is None and not one.transposed and not one.bias
    return plain and isinstance(record, LoHa | LoKr) and not _has_core(record)


def _has_core(record: LoHa | LoKr) -> bool:
    return (record.t1 if isinstance(record, LoHa) else record.t2) is not None


def _products(
    thin: Sequence[Contribution], factor: Callable[[Ref], Tensor], wide: torch.dtype, memory: Memory
) -> Iterator[_Products]:
    """Put all LoRAs on the same rows together."""
    by_rows: dict[tuple[int, int], list[Scaled]] = {}
    for one in thin:
        record = as_lora("", one.record)  # a mid goes into the down
        up, down = factor(record.up), factor(record.down)
        rows = one.rows
        if one.transposed:
            up, down, rows = down.T.contiguous(), up.T.contiguous(), (0, down.shape[1])
        by_rows.setdefault(rows, []).append((record.scale * one.strength, up, down))
    for rows, scaled in by_rows.items():
        yield _Products(*rows, scaled, wide, memory)


def _others(added: Sequence[Contribution], get: Callable[[Ref], Tensor]) -> list[_Adder]:
    """Return what adds rows of Hadamard and Kronecker products, whose whole is never made."""
    found: list[_Adder] = []
    for one in added:
        if not in_rows(one):
            continue
        scale = one.record.scale * one.strength
        if isinstance(one.record, LoHa):
            a1, b1, a2, b2 = (
                get(ref).flatten(1) for ref in (one.record.w1_a, one.record.w1_b, one.record.w2_a, one.record.w2_b)
            )
            found.append((*one.rows, partial(_add_hadamard, a1=a1 * scale, b1=b1, a2=a2, b2=b2)))
        elif isinstance(one.record, LoKr):
            first, second = factors(one.record, get)
            found.append((*one.rows, partial(_add_kronecker, first=first * scale, second=second.flatten(1))))
    return found


def _add_hadamard(
    tile: Tensor, rows: slice, columns: slice, fresh: bool, *, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor
) -> None:
    made = (a1[rows] @ b1[:, columns]).mul_(a2[rows] @ b2[:, columns])
    tile.copy_(made) if fresh else tile.add_(made)


def _add_kronecker(tile: Tensor, rows: slice, _columns: slice, fresh: bool, *, first: Tensor, second: Tensor) -> None:
    """Row i of w1 ⊗ w2 is row i / p of w1 times row i % p of w2, for a w2 of p rows."""
    index = torch.arange(rows.start, rows.stop, device=tile.device)
    left, right = first[index // second.shape[0]], second[index % second.shape[0]]
    made = (left[:, :, None] * right[:, None, :]).flatten(1)
    tile.copy_(made) if fresh else tile.add_(made)


def _dense(
    dense: Sequence[Contribution], get: Callable[[Ref], Tensor], weight: Tensor | None, shape: torch.Size
) -> Tensor | None:
    """Return the sum of all changes that are no plain products, of the tensor's shape; None where there are none."""
    total: Tensor | None = None
    for one in dense:
        whole = one.transposed or one.rows == (0, shape[0])
        part = shape[::-1] if one.transposed else (one.rows[1] - one.rows[0], *shape[1:])
        if one.bias:
            assert one.record.bias is not None, "placed for its bias"
            made = get(one.record.bias).reshape(part)
            if isinstance(one.record, Full) and one.record.new_bias:
                assert weight is not None, "asked for by needs_weight"
                made = made - weight.reshape(part)
        elif isinstance(one.record, Norm):
            made = get(one.record.weight).reshape(part)
        else:
            mine = None
            if weight is not None and needs_weight(one.record):
                mine = weight.T if one.transposed else weight[one.rows[0] : one.rows[1]]
            made = delta(one.record, get, mine, tuple(part))
        made = made.T if one.transposed else made
        if total is None and whole:
            total = made * one.strength
            continue
        total = torch.zeros(shape, dtype=made.dtype, device=made.device) if total is None else total
        rows = slice(None) if one.transposed else slice(*one.rows)
        total[rows] += made * one.strength
    return total
