"""What is computed for one tensor of the output: a tree of method calls over the tensors that were read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import sdkernels
from sdmerge.method import Place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdkernels.linear import Term
    from sdmerge.method import Method
    from sdmerge.whole import Memory


class Expression(Protocol):
    """What is computed for a tensor."""

    @property
    def elementwise(self) -> bool:
        """Whether blocks are enough for it and everything below it."""

    @property
    def propagates(self) -> bool:
        """Whether NaN or infinity in any of its inputs shows in its result."""

    def __call__(self, tensors: Sequence[Tensor], start: int, /) -> Tensor:
        """Compute it from the step's reads: whole, or the same block of each, which begins at element `start`."""


class Change(Protocol):
    """What is added to a matrix, made piece by piece."""

    @property
    def whole_rows(self) -> bool:
        """Whether tiles must be as wide as the matrix."""

    def fill(self, tile: Tensor, row: int, column: int) -> None:
        """Write the change itself to `tile`, whose first element is at `row` and `column`."""

    def add(self, stored: Tensor, out: Tensor, row: int) -> bool | None:
        """Round whole rows with their change to `out`, in one pass; return whether all is finite.

        None: there is no such pass for them, and nothing is done.

        Args:
            stored: the rows, from `row` on, as they were read.
        """


@runtime_checkable
class InTiles(Protocol):
    """An expression of whole tensors that adds to one of them, tile by tile, so that what is added is never held whole."""

    index: int
    """Which of the step's reads is added to."""

    @property
    def room(self) -> int | None:
        """Bytes that it takes beside pieces of that tensor; None where others of its size are among them."""

    def prepare(self, tensors: Sequence[Tensor], memory: Memory) -> Change:
        """Return what is added.

        Args:
            tensors: the step's reads as stored.
            memory: where large pieces come from; they last as long as the change is used.
        """


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor as it was read: the `index`-th of the step's reads."""

    index: int

    elementwise = True
    propagates = True

    def __call__(self, tensors: Sequence[Tensor], start: int) -> Tensor:
        """Return it as stored."""
        return tensors[self.index]


@dataclass(frozen=True, slots=True)
class Call:
    """A method, called on what its operands give. Between nested calls nothing is rounded to a storage type.

    Attributes:
        values: the parameters' values for this tensor.
        name: the tensor's name in the output.
        operands: the models, and the base model last where `based`.
        beside: other tensors that the method must see, by name, each for every operand.
        family: what the first model is, where that is known.
    """

    method: Method
    values: Mapping[str, Any]
    name: str
    operands: tuple[Expression, ...]
    based: bool
    beside: Mapping[str, tuple[Expression, ...]] = field(default_factory=dict)
    family: str | None = None

    @property
    def elementwise(self) -> bool:
        """Whether blocks are enough for it and everything below it."""
        return self.method.elementwise and all(operand.elementwise for operand in self.operands)

    @property
    def propagates(self) -> bool:
        """Whether NaN or infinity in any of its inputs shows in its result."""
        return self.method.propagates and all(operand.propagates for operand in self.operands)

    @property
    def in_blocks(self) -> bool:
        """Whether blocks are enough once whole tensors were measured, so that no whole result is ever held."""
        return self.method.measure is not None and all(isinstance(operand, Leaf) for operand in self.operands)

    @property
    def summed(self) -> bool:
        """Whether it is a sum of tensors as they were read."""
        return self.method.terms is not None and all(isinstance(operand, Leaf) for operand in self.operands)

    def terms(self, tensors: Sequence[Tensor]) -> Sequence[Term]:
        """Return the terms of the sum that it is, as `summed` says."""
        assert self.method.terms is not None, "summed says so"
        given, extra = self._arguments(tensors, 0)
        return self.method.terms(*given, **extra)

    def measure(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the method needs to know of whole tensors before it is given blocks."""
        assert self.method.measure is not None, "in_blocks says so"
        given, extra = self._arguments(tensors, 0)
        return self.method.measure(*given, **extra)

    def __call__(self, tensors: Sequence[Tensor], start: int, measured: Any = None) -> Tensor:
        """Compute it.

        Args:
            tensors: the step's reads, as stored: whole, or the same block of each.
            start: index of the block's first element; 0 for whole tensors.
            measured: what `measure` returned, where blocks are given.
        """
        given, extra = self._arguments(tensors, start)
        if measured is not None:
            extra["measured"] = measured
        return self.method.function(*given, **extra)

    def _arguments(self, tensors: Sequence[Tensor], start: int) -> tuple[list[Tensor], dict[str, Any]]:
        given = self._widened([operand(tensors, start) for operand in self.operands])
        extra = dict(self.values)
        if self.based:
            extra["base"] = given.pop()
        if self.method.takes_place:
            extra["place"] = Place(self.name, start, self.family)
        if self.method.siblings is not None:
            seen = {name: self._widened([one(tensors, 0) for one in ones]) for name, ones in self.beside.items()}
            extra["beside"] = [{name: ones[i] for name, ones in seen.items()} for i in range(len(self.operands))]
        return given, extra

    def _widened(self, given: list[Tensor]) -> list[Tensor]:
        if self.method.mixed:
            return given
        wide = sdkernels.cast.accumulator(*(x.dtype for x in given))
        return [x.to(wide) for x in given]
