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
class Addition:
    """An adapter to bake into a model: one of the recipe's inputs, by its name there, and how strong."""

    id: str
    strength: float | Weights = 1.0


@dataclass(frozen=True, slots=True)
class Model:
    """One of the recipe's inputs, by its name there, with adapters baked in."""

    id: str
    adapters: tuple[Addition, ...] = ()

    def __str__(self) -> str:
        return " + ".join((self.id, *(one.id for one in self.adapters)))


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

    def at(self, name: str, table: Table | None) -> Mapping[str, Any]:
        """Return the parameters' values for the tensor `name`."""
        if table is None:
            return self.values
        return {key: _resolved(value, name, table) for key, value in self.values.items()}

    def __str__(self) -> str:
        return f"{self.method.name}({', '.join(map(str, self.operands))})"


@dataclass(frozen=True)
class Recipe:
    """A merge (or a model with adapters), its inputs and what is chosen beside it.

    Attributes:
        inputs: files by the names that `merge` uses.
        options: fields of `sdmerge.options.Options`, for a run to start from.
        output: where to write, if the recipe says so.
    """

    merge: Model | Merge
    inputs: Mapping[str, Input]
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The inputs that the merge uses: A, whose tensors decide what the output holds, first."""
        return tuple(dict.fromkeys(leaves(self.merge)))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The inputs that are adapters."""
        return tuple(dict.fromkeys(one.id for model in models(self.merge) for one in model.adapters))

    @property
    def differs(self) -> bool:
        """Whether any parameter differs from block to block, so that the family must be known."""
        return any(weights_in(self.merge))

    def check_blocks(self, table: Table) -> tuple[str, ...]:
        """Refuse block weights that do not fit the family; return what is done so that the others do.

        Raises:
            RequestError: so it is.
        """
        notes: list[str] = []
        for weights in weights_in(self.merge):
            weights.check(table)
            notes += weights.notes(table)
        return tuple(notes)


def models(node: Model | Merge) -> Iterator[Model]:
    """Yield the models, in order, as often as they are used."""
    if isinstance(node, Model):
        yield node
        return
    for operand in node.operands:
        yield from models(operand)


def leaves(node: Model | Merge) -> Iterator[str]:
    """Yield the names of the models, in order, as often as they are used."""
    return (model.id for model in models(node))


def weights_in(node: Model | Merge) -> Iterator[Weights]:
    """Yield all block weights of a node and of what is below it."""
    for merge in merges(node):
        for value in merge.values.values():
            yield from _weights(value)
    for model in models(node):
        for one in model.adapters:
            yield from _weights(one.strength)


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
