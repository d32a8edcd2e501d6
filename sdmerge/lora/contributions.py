"""Where an adapter's modules go in a model: which tensor each is, which of its rows, and how strong its change is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from sdformats.adapters import fused
from sdformats.adapters.reading import listed
from sdformats.adapters.records import Full, LoRA, Rows
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.hypernetworks import with_folds
from sdmerge.lora.delta import needs_weight
from sdmerge.lora.fits import check_fits, file_of
from sdmerge.lora.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.record import Record
    from sdformats.hypernetwork import Hypernetwork
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.blocks import Weights

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
) -> tuple[Contributions, Counter[int]]:
    """Return what adapters and hypernetworks add to each tensor of a model.

    Args:
        source: the model.
        family: what it is, where that is known.
        adapters: each with its strength for every tensor.

    Returns:
        What is added, and how many modules of an adapter add something, by its `id`.

    Raises:
        FamilyError: an adapter is for another family.
        MismatchError: modules have no place in the model, or other sizes there.
        RequestError: an adapter's scale is not known, or a hypernetwork cannot be folded.
    """
    places = Places(source, family)
    found: Contributions = {}
    counts: Counter[int] = Counter()
    for adapter, strength in with_folds(places, adapters):
        file = file_of(adapter.modules.values())
        if not adapter.scaled:
            raise RequestError(f"{file}: has no known scale (expected its adapter_config.json beside it)")
        if adapter.family and places.family and adapter.family != places.family:
            raise FamilyError(
                f"{file}: is for {adapter.family} (expected one for {places.family}, as {source.path} is)"
            )
        added = {path: _place(found, places, path, record, strength) for path, record in adapter.modules.items()}
        counts[id(adapter)] = sum(map(bool, added.values()))
        if missing := [path for path, number in added.items() if number is None]:
            raise MismatchError(
                f"{source.path}: has no place for {len(missing):,} of the {len(adapter.modules):,} modules of {file}: "
                f"{listed(missing)} (with strength 0 for a part of the model its modules are left out: --te-strength 0)"
            )
    return {name: _regrouped(name, parts) for name, parts in found.items()}, counts


def _place(found: Contributions, places: Places, path: str, record: Record, strength: StrengthOf) -> int | None:
    """Add a module's contributions; return how many there are, or None where it has no place and needs one."""
    place = places.find(path)
    if place is None:
        return 0 if strength(_stand_in(path)) == 0 else None
    specs = places.source.specs
    shape = specs[place.weight].shape[:: -1 if place.transposed else 1]
    rows = place.range_of(shape[0])
    amount = strength(place.weight)
    if amount == 0:
        return 0
    record = fused.swapped(record) if place.swapped else record
    check_fits(path, record, (rows[1] - rows[0], *shape[1:]), place.weight)
    changed = 0
    if not (isinstance(record, Full) and record.weight is None):
        found.setdefault(place.weight, []).append(Contribution(record, amount, rows, place.transposed))
        changed += 1
    if record.bias is None:
        return changed
    if place.bias not in specs:
        return None
    found.setdefault(place.bias, []).append(Contribution(record, amount, rows, bias=True))
    return changed + 1


def _stand_in(path: str) -> str:
    """Return a tensor's name that stands for a module's part of the model, for its strength."""
    component, _, rest = path.partition(".")
    return f"unet.{rest}.weight" if component == "unet" else f"text_encoder.{rest}.weight"


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


def strength_of(strength: float | Weights, table: object) -> StrengthOf:
    """Return a function that tells an adapter's strength for a tensor by its name."""
    from sdmerge.block_tables import Table
    from sdmerge.blocks import Weights

    if not isinstance(strength, Weights):
        return lambda _name: strength
    assert isinstance(table, Table), "block weights need the family's table"
    return lambda name: strength.at(name, table)
