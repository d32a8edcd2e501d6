"""Bake adapters into a model: which tensor each module is, and what is added to it.

All changes are taken from the model's own weights and added up in float32, with one rounding at the end. Plain LoRA never
makes its whole difference: ranks of all adapters are put side by side, and rows are multiplied while they are in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import torch

from sdformats.adapters import fused
from sdformats.adapters.reading import listed
from sdformats.adapters.records import Full, LoHa, LoKr, LoRA, Norm, Rows
from sdformats.views import Stored
from sdkernels import cast, linear, native
from sdkernels.packed import pack
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.hypernetworks import with_folds
from sdmerge.lora.algebra import as_lora
from sdmerge.lora.delta import delta, factors, needs_weight
from sdmerge.lora.places import Places
from sdmerge.whole import fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.record import Record
    from sdformats.hypernetwork import Hypernetwork
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdkernels.packed import Packed, Scaled
    from sdmerge.blocks import Weights
    from sdmerge.expression import Change
    from sdmerge.lora.places import Place
    from sdmerge.whole import Memory

    StrengthOf = Callable[[str], float]
    """Returns an adapter's strength for one tensor of the model."""


@dataclass(frozen=True)
class Contribution:
    """What one module of an adapter adds to one tensor.

    Attributes:
        record: what is trained.
        strength: what its change is multiplied with, beside its own scale.
        rows: the tensor's rows that are the module.
        transposed: whether the tensor is (in, out).
        bias: whether the tensor is the module's bias.
    """

    record: Record
    strength: float
    rows: tuple[int, int]
    transposed: bool = False
    bias: bool = False

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The tensors that it needs."""
        if self.bias:
            return (self.record.bias,) if self.record.bias is not None else ()
        return tuple(ref for name, ref in self.record.refs if name != "bias")

    @property
    def thin(self) -> bool:
        """Whether it is a product of two factors alone."""
        record = self.record
        return isinstance(record, LoRA) and record.magnitude is None and not self.bias


Contributions = dict[str, list[Contribution]]


def contributions(
    source: TensorSource, family: str | None, adapters: Iterable[tuple[Adapter | Hypernetwork, StrengthOf]]
) -> Contributions:
    """Return what adapters and hypernetworks add to each tensor of a model.

    Args:
        source: the model.
        family: what it is, where that is known.
        adapters: each with its strength for every tensor.

    Raises:
        FamilyError: an adapter is for another family.
        MismatchError: modules have no place in the model, or other sizes there.
        RequestError: an adapter's scale is not known, or a hypernetwork cannot be folded.
    """
    places = Places(source, family)
    found: Contributions = {}
    for adapter, strength in with_folds(places, adapters):
        if not adapter.scaled:
            raise RequestError(
                f"an adapter for {source.path.name} has no known scale: put its adapter_config.json beside it"
            )
        if adapter.family and places.family and adapter.family != places.family:
            raise FamilyError(f"{source.path}: is {places.family}, and the adapter is for {adapter.family}")
        missing = [
            path for path, record in adapter.modules.items() if not _place(found, places, path, record, strength)
        ]
        if missing:
            raise MismatchError(
                f"{source.path}: has no place for {len(missing):,} of the adapter's {len(adapter.modules):,} modules: "
                f"{listed(missing)} (with strength 0 for a part of the model its modules are left out: --te-strength 0)"
            )
    return {name: _regrouped(name, added) for name, added in found.items()}


def _place(found: Contributions, places: Places, path: str, record: Record, strength: StrengthOf) -> bool:
    """Add a module's contributions; return whether it has a place, or needs none."""
    place = places.find(path)
    if place is None:
        return strength(_stand_in(path)) == 0
    specs = places.source.specs
    shape = specs[place.weight].shape
    rows = place.range_of(shape[1 if place.transposed else 0])
    amount = strength(place.weight)
    if amount == 0:
        return True
    record = fused.swapped(record) if place.swapped else record
    if not (isinstance(record, Full) and record.weight is None):
        _check_shape(path, record, shape, place, rows)
        found.setdefault(place.weight, []).append(Contribution(record, amount, rows, place.transposed))
    if record.bias is None:
        return True
    if place.bias not in specs:
        return False
    found.setdefault(place.bias, []).append(Contribution(record, amount, rows, bias=True))
    return True


def _stand_in(path: str) -> str:
    """Return a tensor's name that stands for a module's part of the model, for its strength."""
    component, _, rest = path.partition(".")
    return f"unet.{rest}.weight" if component == "unet" else f"text_encoder.{rest}.weight"


def _check_shape(path: str, record: Record, shape: tuple[int, ...], place: Place, rows: tuple[int, int]) -> None:
    """Refuse factors of another size than the weight's, before anything is written."""
    height = record.height
    if height is not None and height != rows[1] - rows[0]:
        raise MismatchError(f"{place.weight!r}: has {rows[1] - rows[0]} rows, and the adapter's {path} has {height}")
    if isinstance(record, LoRA):
        inputs = shape[0] if place.transposed else prod(shape[1:])
        columns = record.columns if record.mid is None else record.columns * prod(record.mid.shape[2:])
        if columns != inputs:
            raise MismatchError(f"{place.weight!r}: has {inputs} columns, and the adapter's {path} has {columns}")


def _regrouped(name: str, added: list[Contribution]) -> list[Contribution]:
    """Put rows of one fused record together again where its change depends on the whole fused weight."""
    result: list[Contribution] = []
    groups: dict[int, list[Contribution]] = {}
    for one in added:
        if isinstance(one.record, Rows) and needs_weight(one.record):
            groups.setdefault(id(one.record.of), []).append(one)
        else:
            result.append(one)
    for parts in groups.values():
        parts.sort(key=lambda one: one.rows)
        first = parts[0]
        assert isinstance(first.record, Rows), "grouped above"
        taken = [pair for part in parts if isinstance(part.record, Rows) for pair in part.record.ranges]
        whole = first.record.of
        edges = [part.rows for part in parts]
        in_order = taken[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(taken))
        if not in_order or taken != edges or taken[-1][1] != whole.height or len({p.strength for p in parts}) > 1:
            raise MismatchError(
                f"{name!r}: an adapter changes q, k and v as one module of {whole.algorithm}, which this model has apart"
            )
        result.append(replace(first, record=whole, rows=(0, edges[-1][1])))
    return result


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
    def beside(self) -> int | None:
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


def strength_of(strength: float | Weights, table: object) -> StrengthOf:
    """Return a function that tells an adapter's strength for a tensor by its name."""
    from sdmerge.block_tables import Table
    from sdmerge.blocks import Weights

    if not isinstance(strength, Weights):
        return lambda _name: strength
    assert isinstance(table, Table), "block weights need the family's table"
    return lambda name: strength.at(name, table)
