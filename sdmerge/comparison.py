"""What differs between two models: tensor by tensor, block by block, in numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from sdformats.layout import FAMILIES, component_of
from sdmerge.blocks import table
from sdmerge.dtypes import TORCH
from sdmerge.errors import FamilyError
from sdmerge.execute import open_model, shown
from sdmerge.measure import Measures, compare
from sdmerge.options import Options
from sdmerge.policy import EMA, Notes, View, check_together
from sdmerge.respelling import view_alike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from sdformats.tensor import Spec
    from sdmerge.arguments import PathLike
    from sdmerge.blocks import Table

    Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

Status = Literal["identical", "changed", "shape", "type", "only_a", "only_b"]
_NUMBERED = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
_MOST_BLOCKS = 200


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor, or two of one name.

    Attributes:
        component: unet, te1, te2, te3, te, vae, ema or other.
        block: as ``sdmerge blocks`` names it; where the family has no table, the name up to its first number.
        a, b: shape and type in each file; None where it has no such tensor.
        measures: None where the tensors cannot be compared.
    """

    name: str
    component: str
    block: str
    a: Spec | None
    b: Spec | None
    measures: Measures | None = None

    @property
    def status(self) -> Status:
        """What is to be said first about it. ``type``: element types that are no numbers, and differ."""
        if self.a is None:
            return "only_b"
        if self.b is None:
            return "only_a"
        if self.measures is None:
            return "type" if self.a.shape == self.b.shape else "shape"
        return "changed" if self.measures.changed else "identical"

    @property
    def types_differ(self) -> bool:
        """Whether both files have it, in different element types."""
        return self.a is not None and self.b is not None and self.a.dtype != self.b.dtype


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """The tensors of one block in one component.

    Attributes:
        tensors: by status, how many.
        measures: over all that could be compared.
    """

    component: str
    block: str
    tensors: Counter[Status]
    measures: Measures

    @classmethod
    def of(cls, component: str, block: str, tensors: Iterable[TensorDifference]) -> BlockDifference:
        """Sum up some tensors."""
        tensors = tuple(tensors)
        measures = Measures.of([one.measures for one in tensors if one.measures is not None])
        return cls(component, block, Counter(one.status for one in tensors), measures)


@dataclass(frozen=True)
class Difference:
    """What differs between two models.

    Attributes:
        a, b: the files.
        family: what they are, where that is known.
        tensors: every tensor, in the order of A's file, what only B has behind.
        order: the family's blocks in order.
        notes: what was decided on the way, one line each.
    """

    a: Path
    b: Path
    family: str | None
    tensors: tuple[TensorDifference, ...]
    order: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors with the same types, shapes and bits. Metadata and order do not count."""
        return all(one.status == "identical" and not one.types_differ for one in self.tensors)

    @cached_property
    def blocks(self) -> tuple[BlockDifference, ...]:
        """The tensors by block and component, in the model's order."""
        rank = {name: i for i, name in enumerate(self.order)}
        groups: dict[tuple[str, str], list[TensorDifference]] = {}
        for one in self.tensors:
            groups.setdefault((one.component, one.block), []).append(one)
        keys = sorted(groups, key=lambda key: (rank.get(key[1], len(rank)), key[0]))
        return tuple(BlockDifference.of(*key, groups[key]) for key in keys)

    @cached_property
    def total(self) -> BlockDifference:
        """Everything together."""
        return BlockDifference.of("all", "", self.tensors)

    def with_status(self, status: Status) -> tuple[TensorDifference, ...]:
        """Return the tensors of one status."""
        return tuple(one for one in self.tensors if one.status == status)

    def most_changed(self, count: int) -> tuple[TensorDifference, ...]:
        """Return the changed tensors with the largest distance, largest first; those without one are last."""

        def rank(one: TensorDifference) -> tuple[float, int, str]:
            assert one.measures is not None, "changed tensors have been compared"
            distance = one.measures.distance
            return (-1.0 if distance is None else distance) * -1, -one.measures.changed, one.name

        return tuple(sorted(self.with_status("changed"), key=rank)[:count])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data for JSON: numbers that JSON has not (infinity) are None, the norms beside them tell."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "family": self.family,
            "identical": self.identical,
            "total": _block_data(self.total),
            "blocks": [_block_data(one) for one in self.blocks],
            "tensors": [_tensor_data(one) for one in self.tensors],
            "notes": list(self.notes),
        }


def diff(
    a: PathLike,
    b: PathLike,
    *,
    ema: bool = False,
    threads: int | None = None,
    family: str | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare two models, tensor by tensor.

    Args:
        a, b: models of one family, in any containers and spellings; or two adapters. Tensors have A's names.
        ema: compare ``model_ema.*`` too.
        threads: how many read and compute; None takes the processor's cores, 8 at most.
        family: what the models are, where their structure does not tell.
        progress: called with a label and a total in bytes; returns a context that yields a function taking bytes done.

    Raises:
        sdformats.errors.FormatError: a file cannot be read.
        FamilyError: different families, or nothing in common.
        RequestError: one is an adapter and the other is not, or an option has no meaning.
        MismatchError: an fp8 tensor's factor does not fit it.
    """
    options = Options(ema="keep" if ema else "drop", threads=threads, family=family, progress=progress)
    notes = Notes()
    with ExitStack() as stack:
        opened = [open_model(stack, Path(path), options) for path in (a, b)]
        spelling = opened[0][1].spelling
        views = [view_alike(label, *one, spelling, options, notes) for label, one in zip("AB", opened, strict=True)]
        for one in views:
            _note_left_out(one, notes)
        _check(views, options, notes)
        first, second = views
        known = first.detection.family or second.detection.family
        found = _laid_out(first, second, known, notes)
        pairs = [(first.tensors[one.name], second.tensors[one.name]) for one in found if _comparable(one)]
        total = sum(read.spec.nbytes for pair in pairs for read in pair)
        with shown(options, "comparing", total) as advance:
            measures = iter(compare(pairs, options.threads, advance))
        for one in views:
            one.source.verify()
    done = tuple(_measured(one, next(measures)) if _comparable(one) else one for one in found)
    order = tuple(row.name for row in table(known).rows) if known in FAMILIES else ()
    return Difference(Path(a), Path(b), known, done, order or _by_appearance(done), notes.lines())


def _note_left_out(one: View, notes: Notes) -> None:
    """Say which tensors a view has put aside, beyond what it says itself."""
    used = {key for read in one.tensors.values() for key in (read.key, read.scale)}
    for name in one.source.specs:
        if name not in used and not name.startswith(EMA):
            notes.add(f"{one.label}: what goes with fp8 weights but does not scale them is not compared", name)
    for said in one.source.notes:
        notes.add(f"{one.label}: {said}")


def _check(views: Sequence[View], options: Options, notes: Notes) -> None:
    """Refuse what merging would refuse; but two adapters may be compared."""
    first, second = views
    if not all(one.detection.kind == "adapter" for one in views):
        found = Notes()
        check_together(views, options, found)
        for line in found.lines():
            notes.add(line.partition("; the output")[0])  # there is no output here
        return
    if not first.tensors.keys() & second.tensors.keys():
        raise FamilyError(
            f"{first.source.path} and {second.source.path} have no tensor in common; nothing can be compared"
        )
    notes.add("adapters are compared factor by factor: other factors can make the same change to a model")


def _laid_out(first: View, second: View, family: str | None, notes: Notes) -> list[TensorDifference]:
    """Return every tensor with its place, in the order of A's bytes, not measured yet."""
    names = sorted(first.tensors, key=lambda name: first.source.position(first.tensors[name].key))
    names += [name for name in second.tensors if name not in first.tensors]
    blocks = _blocks_of(names, family)
    spelling = first.detection.spelling or second.detection.spelling
    found = []
    known = table(family if family in FAMILIES else "sd1")
    for name in names:
        a, b = (one.tensors[name].spec if name in one.tensors else None for one in (first, second))
        component = _component(name, spelling, known)
        one = TensorDifference(name, component, "EMA" if component == "ema" else blocks[name], a, b)
        if one.types_differ and _comparable(one):
            notes.add(
                f"B holds {cast('Spec', one.b).dtype} where A holds {cast('Spec', one.a).dtype}; compared by value",
                name,
            )
        found.append(one)
    return found


def _component(name: str, spelling: str | None, known: Table) -> str:
    if name.startswith(EMA):
        return "ema"
    found = component_of(name, spelling)
    return known.component_of(name) if found == "other" else found


def _blocks_of(names: Sequence[str], family: str | None) -> dict[str, str]:
    """Return each tensor's block: from the family's table, else what comes before the first number in its name."""
    if family in FAMILIES:
        known = table(family)
        return {name: known.block_of(name) for name in names}
    found = {name: match[0] if (match := _NUMBERED.match(name)) else "rest" for name in names}
    return found if len(set(found.values())) <= _MOST_BLOCKS else dict.fromkeys(names, "all")


def _by_appearance(tensors: Iterable[TensorDifference]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.block for one in tensors))


def _comparable(one: TensorDifference) -> bool:
    if one.a is None or one.b is None or one.a.shape != one.b.shape:
        return False
    return one.a.dtype == one.b.dtype or (one.a.dtype in TORCH and one.b.dtype in TORCH)


def _measured(one: TensorDifference, measures: Measures) -> TensorDifference:
    return TensorDifference(one.name, one.component, one.block, one.a, one.b, measures)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _measure_data(measures: Measures) -> dict[str, Any]:
    return {
        "elements": measures.elements,
        "changed_elements": measures.changed,
        "nonfinite_elements": measures.nonfinite,
        "distance": _finite(measures.distance),
        "cosine": _finite(measures.cosine),
        "norm_a": _finite(math.sqrt(measures.aa)) if measures.measured else None,
        "norm_b": _finite(math.sqrt(measures.bb)) if measures.measured else None,
        "norm_difference": _finite(math.sqrt(measures.dd)) if measures.measured else None,
    }


def _block_data(one: BlockDifference) -> dict[str, Any]:
    statuses = ("identical", "changed", "shape", "type", "only_a", "only_b")
    return {
        "component": one.component,
        "block": one.block,
        "tensors": {status: one.tensors[cast("Status", status)] for status in statuses},
        **_measure_data(one.measures),
    }


def _tensor_data(one: TensorDifference) -> dict[str, Any]:
    sides = {"a": one.a, "b": one.b}
    return {
        "name": one.name,
        "component": one.component,
        "block": one.block,
        "status": one.status,
        **{side: spec and {"dtype": str(spec.dtype), "shape": list(spec.shape)} for side, spec in sides.items()},
        **_measure_data(one.measures or Measures()),
    }
