"""Rules that give single tensors a weight of their own, on top of block weights.

Two kinds, told apart by the number of fields:

- ``BLOCKS:ELEMENTS:RATIO``, supermerger's elemental syntax: ``OUT03 OUT04:attn2 attn1.to_out:0.5``. Spaces separate several
  blocks or elements, blocks may be ranges, ``NOT`` in front turns a field around, an empty field means all. An element is
  looked for anywhere in the tensor's name.
- ``PATTERN:RATIO``: the full name against a pattern with ``*``, ``?`` and ``[...]``: ``*.attn1.*:0.2``.

Commas and line ends separate rules; of several that fit a tensor the last counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sdmerge.block_tables import BASE, canonical
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdmerge.block_tables import Table

_NOT = "NOT"
_SYNTAX = "expected BLOCKS:ELEMENTS:RATIO, as in IN00-IN05:attn2:0.3, or PATTERN:RATIO, as in *.attn1.*:0.2"


@dataclass(frozen=True, slots=True)
class Rule:
    """A weight, and which tensors it is for.

    Attributes:
        ratio: the weight.
        pattern: what the full name must match; None in a rule about blocks and elements.
        blocks: blocks and ranges of them; empty for all, except the VAE, which must be named.
        elements: parts of names, any of which must be there; empty for all.
        not_blocks: whether it is for all blocks but these and the VAE.
        not_elements: whether it is for the tensors with none of the elements.
    """

    ratio: float
    pattern: str | None = None
    blocks: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    not_blocks: bool = False
    not_elements: bool = False

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read one rule.

        Raises:
            RequestError: it is none.
        """
        if not isinstance(text, str):
            raise RequestError(f"rule {text!r} is no text ({_SYNTAX})")
        shown = text.strip()
        fields = [field.strip() for field in shown.split(":")]
        if len(fields) not in (2, 3) or (len(fields) == 2 and not fields[0]):
            raise RequestError(f"rule {shown!r} cannot be read ({_SYNTAX})")
        ratio = _ratio(fields[-1], shown)
        if len(fields) == 2:
            return cls(ratio, pattern=fields[0])
        blocks, not_blocks = _words(fields[0], shown)
        elements, not_elements = _words(fields[1], shown)
        return cls(ratio, None, tuple(map(_spelled, blocks)), elements, not_blocks, not_elements)

    def matches(self, name: str, block: str, table: Table) -> bool:
        """Whether it is for the tensor `name`, which lies in `block`.

        Raises:
            RequestError: it names a block that the family does not have.
        """
        if self.pattern is not None:
            return fnmatchcase(name, self.pattern)
        if block not in _reach(self, table):
            return False
        return not self.elements or any(one in name for one in self.elements) != self.not_elements

    def check(self, table: Table) -> None:
        """Refuse blocks that the family does not have.

        Raises:
            RequestError: it names one.
        """
        _reach(self, table)

    def __str__(self) -> str:
        ratio = f"{self.ratio!r}"
        if self.pattern is not None:
            return f"{self.pattern}:{ratio}"
        blocks = " ".join(((_NOT,) if self.not_blocks else ()) + self.blocks)
        elements = " ".join(((_NOT,) if self.not_elements else ()) + self.elements)
        return f"{blocks}:{elements}:{ratio}"


def parse_rules(texts: str | Iterable[Any]) -> tuple[Rule, ...]:
    """Read rules from a text, or from a list of texts; empty ones between commas are passed over.

    Raises:
        RequestError: one cannot be read.
    """
    found: list[Rule] = []
    for text in (texts,) if isinstance(texts, str) else texts:
        if isinstance(text, Rule):
            found.append(text)
        elif isinstance(text, str):
            found += [Rule.parse(part) for part in re.split(r"[,\n]", text) if part.strip()]
        else:
            raise RequestError(f"rule {text!r} is no text ({_SYNTAX})")
    return tuple(found)


@lru_cache(maxsize=1024)
def _reach(rule: Rule, table: Table) -> frozenset[str]:
    """Return the blocks a rule is for. BASE is among all even where the list of weights has no place for it, as in Flux."""
    everything = {*table.blocks, BASE}
    try:
        named = {block for word in rule.blocks for block in table.expand(word)}
    except RequestError as error:
        raise RequestError(f"rule {str(rule)!r}: {error}") from None
    if not named:
        return frozenset(everything)
    return frozenset(everything - named if rule.not_blocks else named)


def _words(field: str, rule: str) -> tuple[tuple[str, ...], bool]:
    words = tuple(field.split())
    if words[:1] != (_NOT,):
        return words, False
    if len(words) == 1:
        raise RequestError(f"rule {rule!r} says NOT and nothing behind it ({_SYNTAX})")
    return words[1:], True


def _spelled(word: str) -> str:
    return "-".join(canonical(end) for end in word.split("-"))


def _ratio(text: str, rule: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not math.isfinite(ratio):
        raise RequestError(f"rule {rule!r}: {text!r} is no finite number ({_SYNTAX})")
    return ratio
