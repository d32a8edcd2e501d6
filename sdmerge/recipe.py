"""What to do, as frozen nodes: models, and merges of models or of other merges.

A merge inside a merge is computed tensor by tensor in the same pass; nothing is rounded or written in between.
`sdmerge.recipe_file` reads recipes from YAML and writes them as data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdmerge import method as methods
from sdmerge.blocks import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sdmerge.blocks import Table
    from sdmerge.method import Method

    Node = "Model | Merge"

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Models that have no name in a recipe are named by letters, as users name them."""


@dataclass(frozen=True, slots=True)
class Input:
    """A model file or folder, and what its sha256 must be where that is known."""

    path: Path
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One of the recipe's inputs, by its name there."""

    id: str

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, slots=True)
class Merge:
    """A method, its models and its parameters; checked when made.

    Attributes:
        operands: its models, A first; and the base model last where `based`.
        values: every parameter's value: a number, a text, a `Weights`, or a tuple of numbers and `Weights`.
    """

    method: Method
    operands: tuple[Model | Merge, ...]
    based: bool
    values: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        method: str,
        models: Sequence[Model | Merge],
        values: Mapping[str, Any] | None = None,
        base: Model | Merge | None = None,
    ) -> Merge:
        """Make one.

        Raises:
            RequestError: unknown method or parameter, value out of range, wrong number of models, missing base.
        """
        found = methods.find(method)
        found.check_models(len(models), base=base is not None)
        operands = (*models, *(() if base is None else (base,)))
        return cls(found, operands, base is not None, found.check(len(models), values or {}))

    @property
    def differs(self) -> bool:
        """Whether a parameter differs from tensor to tensor."""
        return any(_weights(value) for value in self.values.values())

    def check_blocks(self, table: Table) -> tuple[str, ...]:
        """Refuse block weights that do not fit the family, here and below; return what is done so that the others do.

        Raises:
            RequestError: so it is.
        """
        notes: list[str] = []
        for node in merges(self):
            for value in node.values.values():
                for weights in _weights(value):
                    weights.check(table)
                    notes += weights.notes(table)
        return tuple(notes)

    def at(self, name: str, table: Table | None) -> Mapping[str, Any]:
        """Return the parameters' values for the tensor `name`."""
        if table is None:
            return self.values
        return {key: _resolved(value, name, table) for key, value in self.values.items()}

    def __str__(self) -> str:
        return f"{self.method.name}({', '.join(map(str, self.operands))})"


@dataclass(frozen=True)
class Recipe:
    """A merge, its inputs and what is chosen beside it.

    Attributes:
        inputs: files by the names that `merge` uses.
        options: fields of `sdmerge.options.Options`, for a run to start from.
        output: where to write, if the recipe says so.
    """

    merge: Merge
    inputs: Mapping[str, Input]
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The inputs that the merge uses: A, whose tensors decide what the output holds, first."""
        return tuple(dict.fromkeys(leaves(self.merge)))

    @property
    def differs(self) -> bool:
        """Whether any parameter differs from block to block, so that the family must be known."""
        return any(node.differs for node in merges(self.merge))


def leaves(node: Model | Merge) -> Iterator[str]:
    """Yield the names of the models, in order, as often as they are used."""
    if isinstance(node, Model):
        yield node.id
        return
    for operand in node.operands:
        yield from leaves(operand)


def merges(node: Model | Merge) -> Iterator[Merge]:
    """Yield a merge and all merges below it."""
    if isinstance(node, Merge):
        yield node
        for operand in node.operands:
            yield from merges(operand)


def _weights(value: Any) -> tuple[Weights, ...]:
    return tuple(one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Weights))


def _resolved(value: Any, name: str, table: Table) -> Any:
    if isinstance(value, Weights):
        return value.at(name, table)
    if isinstance(value, tuple):
        return tuple(_resolved(one, name, table) for one in value)
    return value
