"""How a layout names tensors: the beginning tells the component, the middle the module, the end the role."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

from sdformats.adapters import names
from sdformats.adapters.roles import LENGTHS, MAGNITUDE
from sdformats.rule import Rule, one

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NO_TEXT_MODEL = re.compile(r"(encoder\.layers\.|embeddings\.|final_layer_norm\b)")
_TEXT_MODEL = "text_model."


@dataclass(frozen=True)
class Prefix:
    """A beginning of names.

    Attributes:
        text: how it is written.
        component: what it stands for.
        table: the table of module names (see `names`); ``any`` takes dotted names as they are.
        flat: whether dots are written as underscores.
        families: the families it is written for; empty: all.
        reads: whether names that begin so are read only, never written.
    """

    text: str
    component: str
    table: str
    flat: bool = True
    families: tuple[str, ...] = ()
    reads_only: bool = False

    def find(self, middle: str) -> Rule | None:
        """Return our modules by the name in the file, without the prefix."""
        return _table(self.table, self.flat).get(middle) if self.table != "any" else one(_dialect(self, middle))

    def spell(self, path: str, family: str | None) -> str | None:
        """Return the name in a file of the module that `path` is, or is part of; None where the table has none."""
        if self.table == "any":
            dotted: str | None = path
        else:
            dotted = _inverse(self.table, family in ("sd1", "sd2", "sdxl-refiner")).get(path)
        if dotted is None:
            return None
        return self.text + (dotted.replace(".", "_") if self.flat else dotted)


def _dialect(prefix: Prefix, middle: str) -> str:
    """Give CLIP's names the ``text_model.`` that transformers 5 leaves out."""
    if prefix.component in ("te1", "te2") and _NO_TEXT_MODEL.match(middle):
        return _TEXT_MODEL + middle
    return middle


@cache
def _dotted(table: str) -> Mapping[str, Rule]:
    """Return our modules by a file's dotted name."""
    fused = {"flux": names.flux, "sd3": names.sd3}
    if table in fused:
        return fused[table]()
    if table == "sgm":
        return {theirs: one(ours) for theirs, ours in names.unet_sgm().items()}
    plain = {"unet": names.unet, "clip": names.clip, "t5": names.t5, "transformer": names.transformer}
    paths = {path: one(path) for path in plain[table]()}
    # transformers 5 leaves text_model. out.
    return paths | ({path.removeprefix(_TEXT_MODEL): one(path) for path in paths} if table == "clip" else {})


@cache
def _table(table: str, flat: bool) -> Mapping[str, Rule]:
    dotted = _dotted(table)
    return {name.replace(".", "_"): fusion for name, fusion in dotted.items()} if flat else dotted


@cache
def _inverse(table: str, shallow_first: bool) -> Mapping[str, str]:
    if table == "sgm":
        return names.sgm_of_unet(shallow_first=shallow_first)
    found: dict[str, str] = {}
    for theirs, fusion in _dotted(table).items():
        for path in fusion.parts:
            found.setdefault(path, theirs)
    return found


@dataclass(frozen=True)
class Name:
    """A tensor's name, understood.

    Attributes:
        module: the name of the module in the file.
        role: which of its tensors it is; see `roles`.
        component: which part of the model.
        fusion: our modules, without the component.
        table: the table that the module was found in.
    """

    module: str
    role: str
    component: str
    fusion: Rule
    table: str = "any"


@dataclass(frozen=True)
class Naming:
    """All beginnings and ends of a layout's names.

    Attributes:
        prefixes: tried in order; for writing, the first that fits.
        suffixes: role by suffix; of those of one role, the first is written.
    """

    prefixes: tuple[Prefix, ...]
    suffixes: Mapping[str, str]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        ends = "|".join(re.escape(end) for end in sorted(self.suffixes, key=len, reverse=True))
        return re.compile(rf"(.+?)\.({ends})")

    @cached_property
    def _ends(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for end, role in self.suffixes.items():
            found.setdefault(role, end)
        return found

    def understand(self, name: str) -> Name | None:
        """Return what a tensor's name means, or None where it is no name of this layout."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        module, end = match.groups()
        for prefix in self.prefixes:
            if module.startswith(prefix.text):
                fusion = prefix.find(module[len(prefix.text) :])
                if fusion is not None:
                    return Name(module, self.suffixes[end], prefix.component, fusion, prefix.table)
        return None

    def module(self, path: str, family: str | None) -> str | None:
        """Return a file's name for one of our modules, or None where it has none."""
        for prefix, spelled in self._spelled(path, family):
            if not prefix.reads_only:
                return spelled
        return None

    def fusion(self, module: str) -> Rule:
        """Return our modules, with their component, by a name that `module` gave.

        Raises:
            KeyError: it gave no such name.
        """
        for prefix in self.prefixes:
            if module.startswith(prefix.text) and (found := prefix.find(module[len(prefix.text) :])) is not None:
                return replace(found, parts=tuple(f"{prefix.component}.{part}" for part in found.parts))
        raise KeyError(module)

    def spell(self, module: str, role: str) -> str | None:
        """Return a tensor's name by its module's, or None where the role has none."""
        end = self._ends.get(role) or (self._ends.get(MAGNITUDE) if role == LENGTHS else None)
        return None if end is None else f"{module}.{end}"

    def _spelled(self, path: str, family: str | None) -> Iterator[tuple[Prefix, str]]:
        component, _, rest = path.partition(".")
        for prefix in self.prefixes:
            if prefix.component == component and (not prefix.families or family in prefix.families):
                spelled = prefix.spell(rest, family)
                if spelled is not None:
                    yield prefix, spelled
