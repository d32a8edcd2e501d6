"""Reversible renames: what a model's tensors are called, and how they are cut, in a single file and in a diffusers folder.

A `Rule` says which modules of the folder one module of the single file is. A `Component` is a part of a model (its network,
its VAE, a text encoder) with a table of rules, which is made for the tensors at hand: as many blocks as there are. A `KeyMap`
is a family's components. Everything is done by views, so nothing is read, and what is split is read where it lies.

A table is looked up by whole names: ``input_blocks.1`` is never taken for the beginning of ``input_blocks.10``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdformats.errors import CorruptFile
from sdformats.rearranged import Identity
from sdformats.rule import PLAIN, Rule, Table, is_factor
from sdformats.views import same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sdformats.views import Ref

EXTRAS = "sdmerge_extras"
"""The component of a folder that keeps what diffusers has no place for, under the names of the single file."""
EXTRAS_FILE = f"{EXTRAS}.safetensors"
"""It lies beside the folder's index, where diffusers does not look."""


class _Lookup:
    """A table, to be asked by names of tensors in either spelling: modules whose names end alike, and tensors that do not."""

    def __init__(self, table: Table) -> None:
        plain = {module: rule for module, rule in table.items() if rule.ends is PLAIN}
        odd = [(module, rule, *ends) for module, rule in table.items() if rule.ends is not PLAIN for ends in rule.ends]
        self._single = plain
        self._folder = {path: (name, i, rule) for name, rule in plain.items() for i, path in enumerate(rule.parts)}
        self._odd_single = {module + theirs: (rule, ours) for module, rule, theirs, ours in odd}
        self._odd_folder = {
            path + ours: (module, index, rule, theirs)
            for module, rule, theirs, ours in odd
            for index, path in enumerate(rule.parts)
        }

    def single(self, name: str) -> tuple[Rule, str] | None:
        """Return the rule of the single file's tensor, and how the folder's names end."""
        module, _, role = name.rpartition(".")
        rule = self._single.get(module)
        return self._odd_single.get(name) if rule is None else (rule, f".{role}")

    def folder(self, name: str) -> tuple[str, int, Rule, str] | None:
        """Return the module that the folder's tensor belongs to, which part it is, and how the single file's name ends."""
        path, _, role = name.rpartition(".")
        found = self._folder.get(path)
        return self._odd_folder.get(name) if found is None else (*found, f".{role}")


def _unchanged(name: str) -> str:
    return name


@dataclass(frozen=True)
class Component:
    """A part of a model.

    Attributes:
        name: its folder.
        prefixes: what its names begin with in a single file. The first is written, the others are read too.
        table: makes its rules for bare names, in either spelling.
        alone: what its names begin with in a single file of its own.
        dialect: turns older and newer names of the same tensors into those of the table.
        identity: a tensor that diffusers needs and that a single file has no use for, as it is the identity matrix; and one
            as long as it is wide. What a single file may hold under its name is not used by programs that read such files.
        twin: a tensor that single files hold beside an equal one, and that one; folders hold only the second.
    """

    name: str
    prefixes: tuple[str, ...]
    table: Callable[[Iterable[str]], Table]
    alone: str = ""
    dialect: Callable[[str], str] = _unchanged
    identity: tuple[str, str] | None = None
    twin: tuple[str, str] | None = None

    def implied(self, tensors: Mapping[str, Ref]) -> dict[str, Ref]:
        """Return what the folder must hold beside these tensors of it."""
        if self.identity is None:
            return {}
        name, beside = (f"{self.name}.{one}" for one in self.identity)
        known = tensors.get(beside)
        return {} if known is None else {name: Identity(known.shape[0], known.spec.dtype)}


@dataclass
class Respelled:
    """A model in its other spelling.

    Attributes:
        tensors: by name.
        kept: names of the single file that diffusers has no place for; they are in the folder's extras.
        left: names of the folder that a single file has no place for; they are not in it.
        in_rows: names of the single file under which factors of several weights have become factors of rows.
        twins: names of the single file that hold an equal tensor again: that were not there, or that have been added.
    """

    tensors: dict[str, Ref] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    in_rows: list[str] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)

    def put(self, name: str, ref: Ref) -> None:
        """Add a tensor.

        Raises:
            CorruptFile: there is one of that name.
        """
        if name in self.tensors:
            raise CorruptFile(f"and another tensor are both {name!r} in the other spelling", key=str(ref))
        self.tensors[name] = ref


@dataclass(frozen=True)
class KeyMap:
    """A family's spellings."""

    components: tuple[Component, ...]

    def to_folder(self, tensors: Mapping[str, Ref], *, alone: str | None = None) -> Respelled:
        """Return a single file's tensors as those of a folder.

        Args:
            tensors: by their names in the single file.
            alone: the component that bare names belong to, in a file of one component.

        Raises:
            CorruptFile: a tensor cannot be cut as it must be.
        """
        made = Respelled()
        beginnings = [(prefix, part) for part in self.components for prefix in part.prefixes]
        places = _places(tensors, beginnings, self._named(alone))
        lookups = _lookups(places)
        for name, ref in tensors.items():
            part, bare = places.get(name, (None, ""))
            found = lookups[part.name].single(bare) if part is not None else None
            if part is None or found is None:
                made.put(f"{EXTRAS}.{name}", ref)
                made.kept.append(name)
                continue
            rule, end = found
            for path, piece in zip(rule.parts, rule.cut(ref, end), strict=True):
                made.put(f"{part.name}.{path}{end}", piece)
        for part in self.components:
            for name, ref in part.implied(made.tensors).items():
                made.put(name, ref)
            _without_twin(made, part)
        return made

    def to_single(self, tensors: Mapping[str, Ref], *, alone: str | None = None) -> Respelled:
        """Return a folder's tensors as those of a single file; the inverse of `to_folder`.

        Args:
            tensors: by their names in the folder, ``component.key``.
            alone: the one component to be written, under the names of a file of its own; bare names are taken for its.

        Raises:
            CorruptFile: what is one tensor in a single file is there only in part, or does not fit together.
        """
        made = Respelled()
        places = _places(tensors, [(f"{part.name}.", part) for part in self.components], self._named(alone))
        lookups = _lookups(places)
        today = {f"{part.name}.{bare}": tensors[name] for name, (part, bare) in places.items()}
        implied = {name: ref for part in self.components for name, ref in part.implied(today).items()}
        joins: dict[str, _Join] = {}
        for name, ref in tensors.items():
            if name.startswith(f"{EXTRAS}."):
                made.put(name.removeprefix(f"{EXTRAS}."), ref)
                continue
            part, bare = places.get(name, (None, ""))
            if part is None:
                made.left.append(name)
                continue
            prefix = part.prefixes[0] if alone is None else part.alone
            expected, found = implied.get(f"{part.name}.{bare}"), lookups[part.name].folder(bare)
            if expected is not None and (expected.spec != ref.spec or not same(expected, ref)):
                made.put(prefix + bare, ref)
            elif found is not None:
                module, index, rule, end = found
                join = joins.setdefault(prefix + module + end, _Join(rule, f".{bare.rpartition('.')[2]}"))
                if not join.pieces:
                    made.put(prefix + module + end, ref)  # keeps the place, until all parts are there
                join.add(index, ref)
            elif expected is None:
                made.left.append(name)
        for name, join in joins.items():
            weight = joins.get(f"{name.rpartition('.')[0]}.weight")
            made.tensors[name] = join.done(weight)
            if all(is_factor(ref, join.end) for ref in join.pieces.values()) and made.tensors[name].spec.numel > 1:
                made.in_rows.append(name)
        for part in self.components:
            _with_twin(made, part, part.prefixes[0] if alone is None else part.alone)
        return made

    def _named(self, component: str | None) -> Component | None:
        return next((part for part in self.components if part.name == component), None)


def _without_twin(made: Respelled, part: Component) -> None:
    """Take a tensor out of a folder that is another one again; say so where a single file had not said it twice."""
    if part.twin is None:
        return
    again, first = (made.tensors.get(f"{part.name}.{one}") for one in part.twin)
    if first is not None and again is None:
        made.twins.append(part.prefixes[0] + part.twin[0])
    elif first is not None and again is not None and same(again, first):
        del made.tensors[f"{part.name}.{part.twin[0]}"]


def _with_twin(made: Respelled, part: Component, prefix: str) -> None:
    """Add what single files hold twice."""
    if part.twin is None:
        return
    again, first = (prefix + one for one in part.twin)
    if first in made.tensors and again not in made.tensors:
        made.put(again, made.tensors[first])
        made.twins.append(again)


@dataclass
class _Join:
    """A tensor of a single file that is being put together.

    Attributes:
        rule: its module's.
        end: how the names of its parts end.
        pieces: the parts, by their index.
    """

    rule: Rule
    end: str
    pieces: dict[int, Ref] = field(default_factory=dict)

    def add(self, index: int, ref: Ref) -> None:
        """Take a part."""
        if index in self.pieces:
            raise CorruptFile("is there twice, under an old and a new name", key=str(ref))
        self.pieces[index] = ref

    def done(self, weight: _Join | None) -> Ref:
        """Return the tensor; `weight` is that of its module, which has as many parts."""
        for index, path in enumerate(self.rule.parts):
            if index not in self.pieces:
                there = next(iter(self.pieces.values()))
                lacking = f"{path}{self.end}"
                raise CorruptFile(f"has no {lacking} beside it, which a single file has in one tensor", key=str(there))
        beside = sorted(weight.pieces.items()) if weight is not None else []
        heights = [ref.shape[0] for _, ref in beside if ref.shape]
        return self.rule.join([ref for _, ref in sorted(self.pieces.items())], self.end, heights)


def _places(
    tensors: Iterable[str], beginnings: Sequence[tuple[str, Component]], alone: Component | None
) -> dict[str, tuple[Component, str]]:
    """Return the component of each tensor, and its bare name there."""
    found: dict[str, tuple[Component, str]] = {}
    for name in tensors:
        for prefix, part in beginnings:
            if name.startswith(prefix):
                found[name] = (part, part.dialect(name[len(prefix) :]))
                break
        else:
            if alone is not None and not name.startswith(f"{EXTRAS}."):
                found[name] = (alone, alone.dialect(name))
    return found


def _lookups(places: Mapping[str, tuple[Component, str]]) -> dict[str, _Lookup]:
    """Return each component's table, made for the names that are there."""
    parts = {part.name: part for part, _ in places.values()}
    inside = {name: [bare for part, bare in places.values() if part.name == name] for name in parts}
    return {name: _Lookup(part.table(inside[name])) for name, part in parts.items()}
