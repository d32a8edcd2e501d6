"""Reversible renames: what a model's tensors are called, and how they are cut, in a single file and in a diffusers folder.

A `Rule` says which modules of the folder one module of the single file is. A `Component` is a part of a model (its network,
its VAE, a text encoder) with a table of rules, which is made for the tensors at hand: as many blocks as there are. A `KeyMap`
is a family's components. Everything is done by views, so nothing is read, and what is split is read where it lies.

A table is looked up by whole names: ``input_blocks.1`` is never taken for the beginning of ``input_blocks.10``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from sdformats.errors import CorruptFile, FormatError
from sdformats.views import Ref, Transposed, halves_swapped, joined, reshaped, rows, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

EXTRAS = "sdmerge_extras"
"""The component of a folder that keeps what diffusers has no place for, under the names of the single file."""
_MOST_DIGITS = 4
_MOST_BLOCKS = 200

Ends = tuple[tuple[str, str], ...]
PLAIN: Ends = ((".", "."),)
"""Every end of a tensor's name is the same in both spellings."""
NAKED: Ends = (("", ".weight"),)
"""The single file has a tensor where the folder has a module with a weight."""
NAKED_IN_BOTH: Ends = (("", ""),)


@dataclass(frozen=True)
class Rule:
    """A module of the single file, and the modules of the folder that are its rows.

    Attributes:
        parts: the folder's modules, in the order of the rows; mostly one.
        shares: how many rows each has, as multiples of each other.
        swapped: whether the two halves of the rows are the other way round (shift and scale).
        swapped_alone: whether they are where there are two, for as many columns each, and not six; for those who do not know
            which block is the last.
        transposed: whether the single file's weight is (in, out).
        pixel: whether the single file's weight is a convolution of one pixel, and the folder's a matrix.
        ends: how names end in the single file and in the folder.
    """

    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swapped: bool = False
    swapped_alone: bool = False
    transposed: bool = False
    pixel: bool = False
    ends: Ends = PLAIN

    def cut(self, ref: Ref, end: str) -> list[Ref]:
        """Return what each part is of the single file's tensor.

        Args:
            ref: the tensor.
            end: how its name ends in the folder: ``.weight``, ``.bias``, ``.scale_weight``.

        Raises:
            CorruptFile: its rows do not divide.
        """
        if _is_factor(ref, end):
            return [ref] * len(self.parts)
        if self.transposed and len(ref.shape) == 2:
            ref = Transposed(ref)
        if self.pixel and end == ".weight" and ref.shape[2:] == (1, 1):
            ref = reshaped(ref, ref.shape[:2])
        if self.swapped:
            ref = halves_swapped(ref)
        if len(self.parts) == 1:
            return [ref]
        unit, left = divmod(ref.shape[0], sum(self.shares))
        if left:
            shares = ":".join(map(str, self.shares))
            raise CorruptFile(f"has {ref.shape[0]} rows, which are no parts of {shares}", key=str(ref))
        edges = [0, *(unit * total for total in accumulate(self.shares))]
        return [rows(ref, start, stop) for start, stop in pairwise(edges)]

    def join(self, refs: Sequence[Ref], end: str) -> Ref:
        """Return the single file's tensor; the inverse of `cut`.

        Raises:
            CorruptFile: the parts do not fit together.
        """
        if all(_is_factor(ref, end) for ref in refs):
            if not all(same(refs[0], other) for other in refs[1:]):
                raise FormatError(
                    "is one of several factors that differ, and a single file has one for all",
                    key=str(refs[0]),
                    advice="choose a type without factors, with --dtype",
                )
            return refs[0]
        self._check(refs)
        ref = joined(refs)
        if self.swapped:
            ref = halves_swapped(ref)
        if self.pixel and end == ".weight" and len(ref.shape) == 2:
            ref = reshaped(ref, (*ref.shape, 1, 1))
        return Transposed(ref) if self.transposed and len(ref.shape) == 2 else ref

    def _check(self, refs: Sequence[Ref]) -> None:
        first = refs[0].spec
        for ref, share in zip(refs, self.shares, strict=True):
            wanted = (first.shape[0] * share // self.shares[0], *first.shape[1:])
            if (ref.shape, ref.spec.dtype) != (wanted, first.dtype):
                expected = f"{first.dtype} {list(wanted)}, to be one tensor with {refs[0]}"
                raise CorruptFile(f"is {ref.spec}", key=str(ref), expected=expected)


def _is_factor(ref: Ref, end: str) -> bool:
    """Whether a tensor is one number for a whole weight, as fp8 weights have beside them."""
    return ref.spec.numel == 1 and end not in (".weight", ".bias")


Table = dict[str, Rule]
"""Rules by the single file's module."""


def one(path: str) -> Rule:
    """Return the rule of a module that is one of the folder's."""
    return Rule((path,))


def as_they_are(modules: Iterable[str]) -> Table:
    """Return the table of modules that have one name in both spellings."""
    return {module: one(module) for module in modules}


def count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that the pattern's first group captures at the beginning of a name; 0 for none.

    Numbers too long to count blocks are passed over: a hostile name may have thousands of digits.
    """
    seek = re.compile(pattern)
    found = (match[match.lastindex or 1] for name in names if (match := seek.match(name)))
    return max((int(digits) + 1 for digits in found if len(digits) <= _MOST_DIGITS), default=0)


def blocks(names: Iterable[str], pattern: str) -> int:
    """Return `count`, for as many blocks as a table may be made for.

    Raises:
        FormatError: there are more.
    """
    found = count(names, pattern)
    if found > _MOST_BLOCKS:
        raise FormatError(f"has {found} blocks of one kind", expected=f"at most {_MOST_BLOCKS}")
    return found


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
    """

    name: str
    prefixes: tuple[str, ...]
    table: Callable[[Iterable[str]], Table]
    alone: str = ""
    dialect: Callable[[str], str] = _unchanged


@dataclass
class Respelled:
    """A model in its other spelling.

    Attributes:
        tensors: by name.
        kept: names of the single file that diffusers has no place for; they are in the folder's extras.
        left: names of the folder that a single file has no place for; they are not in it.
    """

    tensors: dict[str, Ref] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

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
        joins: dict[str, tuple[Rule, str, dict[int, Ref]]] = {}
        for name, ref in tensors.items():
            part, bare = places.get(name, (None, ""))
            found = lookups[part.name].folder(bare) if part is not None else None
            if name.startswith(f"{EXTRAS}."):
                made.put(name.removeprefix(f"{EXTRAS}."), ref)
            elif part is None or found is None:
                made.left.append(name)
            else:
                module, index, rule, end = found
                single = (part.prefixes[0] if alone is None else part.alone) + module + end
                if single not in joins:
                    made.put(single, ref)  # keeps the place, until all parts are there
                _, _, pieces = joins.setdefault(single, (rule, "." + bare.rpartition(".")[2], {}))
                if index in pieces:
                    raise CorruptFile("is there twice, under an old and a new name", key=str(ref))
                pieces[index] = ref
        for single, (rule, end, pieces) in joins.items():
            made.tensors[single] = _joined(single, rule, end, pieces)
        return made

    def _named(self, component: str | None) -> Component | None:
        return next((part for part in self.components if part.name == component), None)


def _joined(single: str, rule: Rule, end: str, pieces: Mapping[int, Ref]) -> Ref:
    for index, path in enumerate(rule.parts):
        if index not in pieces:
            there = next(iter(pieces.values()))
            raise CorruptFile(
                f"has no {path}{end} beside it, which is in one tensor with it in a single file", key=str(there)
            )
    return rule.join([pieces[index] for index in range(len(rule.parts))], end)


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
