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
from sdformats.rearranged import Identity, Repeated, Transposed
from sdformats.views import Ref, halves_swapped, joined, reshaped, rows, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

EXTRAS = "sdmerge_extras"
"""The component of a folder that keeps what diffusers has no place for, under the names of the single file."""
EXTRAS_FILE = f"{EXTRAS}.safetensors"
"""It lies beside the folder's index, where diffusers does not look."""
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

    def join(self, refs: Sequence[Ref], end: str, heights: Sequence[int] = ()) -> Ref:
        """Return the single file's tensor; the inverse of `cut`.

        Args:
            refs: its parts.
            end: how their names end in the folder.
            heights: how many rows of the weight each part has. Factors of whole parts that differ become factors of rows.

        Raises:
            CorruptFile: the parts do not fit together.
        """
        if all(_is_factor(ref, end) for ref in refs):
            if all(same(refs[0], other) for other in refs[1:]):
                return refs[0]
            if len(heights) != len(refs):
                raise CorruptFile("is a factor without its weight beside it", key=str(refs[0]))
            refs = [Repeated(ref, height) for ref, height in zip(refs, heights, strict=True)]
        else:
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
        identity: a tensor that diffusers needs and that a single file has no use for, as it is the identity matrix; and one
            as long as it is wide. What a single file may hold under its name is not used by programs that read such files.
    """

    name: str
    prefixes: tuple[str, ...]
    table: Callable[[Iterable[str]], Table]
    alone: str = ""
    dialect: Callable[[str], str] = _unchanged
    identity: tuple[str, str] | None = None

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
    """

    tensors: dict[str, Ref] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    in_rows: list[str] = field(default_factory=list)

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
            if all(_is_factor(ref, join.end) for ref in join.pieces.values()) and made.tensors[name].spec.numel > 1:
                made.in_rows.append(name)
        return made

    def _named(self, component: str | None) -> Component | None:
        return next((part for part in self.components if part.name == component), None)


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
