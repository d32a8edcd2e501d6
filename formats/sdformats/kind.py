"""Kinds of files that are no model of their own, as values: what they are called, and by what they are known.

Each kind lives in the module of its format and names its layouts there; `kinds` collects them. The layout with the most
matched marks wins. Where two kinds fit equally well, both readings are told, and nobody guesses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sdformats.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.tensor import Spec


@dataclass(frozen=True)
class Looks:
    """What can be seen of a file without reading a tensor.

    Attributes:
        specs: every tensor by name.
        metadata: the texts beside them.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    @cached_property
    def floats(self) -> Mapping[str, Spec]:
        """The tensors of floating-point numbers."""
        return {name: spec for name, spec in self.specs.items() if spec.dtype.is_float}

    @cached_property
    def widths(self) -> frozenset[int]:
        """The sizes of the last axes of the floating tensors."""
        return frozenset(spec.shape[-1] for spec in self.floats.values() if spec.shape)


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A layout, as far as it takes to know it.

    Attributes:
        name: what users call it.
        marks: patterns of names; every name in which one is found speaks for the layout.
        needs: patterns that must each be found in some name.
        whole: whether every name must have a mark, so that nothing else may be in the file.
        fits: tells by shapes and texts too, where names are not enough.
    """

    name: str
    marks: tuple[str, ...]
    needs: tuple[str, ...] = ()
    whole: bool = True
    fits: Callable[[Looks], bool] | None = None

    def score(self, looks: Looks) -> int:
        """Return how many names have a mark; 0 where the layout is out of the question."""
        pattern = re.compile("|".join(self.marks))
        if self.whole and not all(pattern.search(name) for name in looks.specs):
            return 0
        if not all(any(re.search(need, name) for name in looks.specs) for need in self.needs):
            return 0
        marked = sum(pattern.search(name) is not None for name in looks.specs)
        return marked if marked and (self.fits is None or self.fits(looks)) else 0


@dataclass(frozen=True)
class Reading:
    """What a file may be.

    Attributes:
        kind: the kind's name.
        title: the kind in words, with its article.
        layout: the layout's name; None where the kind tells its layouts itself.
        family: what it is for, where that shows.
    """

    kind: str
    title: str
    layout: str | None
    family: str | None


def _unknown(_: Looks) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        name: what users call it.
        title: it in words, with its article.
        layouts: how it is written.
        family: tells what it is for.
        tells_layout: False where the kind tells its layouts apart elsewhere, with more than what is seen here.
    """

    name: str
    title: str
    layouts: tuple[Marked, ...]
    family: Callable[[Looks], str | None] = _unknown
    tells_layout: bool = True

    def read(self, looks: Looks) -> tuple[int, Reading] | None:
        """Return what speaks for a file being of this kind, and what it is then; None where it is not.

        Raises:
            FormatError: two layouts of the kind fit equally well.
        """
        scores = [(layout.score(looks), layout.name) for layout in self.layouts]
        best = max(score for score, _ in scores)
        if best == 0:
            return None
        names = [name for score, name in scores if score == best]
        if len(names) > 1:
            raise FormatError(f"is {self.title} in the layout {' or '.join(names)}, and nothing tells which")
        return best, Reading(self.name, self.title, names[0] if self.tells_layout else None, self.family(looks))
