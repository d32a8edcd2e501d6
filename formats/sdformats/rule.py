"""One module in both spellings: which modules of a folder it is, and how its tensors are cut, turned and put together.

Everything is done by views, so nothing is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from sdformats.errors import CorruptFile, FormatError
from sdformats.rearranged import Repeated, Transposed
from sdformats.views import Ref, halves_swapped, joined, reshaped, rows, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
        if is_factor(ref, end):
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
        if all(is_factor(ref, end) for ref in refs):
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


def is_factor(ref: Ref, end: str) -> bool:
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
