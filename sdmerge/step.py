"""What a run will do: one `Step` for each tensor of the output, known completely before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sdformats.adapters.layout import Written
    from sdformats.tensor import Spec, TensorSource


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor of an input.

    Attributes:
        scale: the key of the factor that an fp8 tensor must be multiplied with, in the same source.
    """

    source: TensorSource
    key: str
    scale: str | None = None

    @property
    def spec(self) -> Spec:
        """Shape and type as stored."""
        return self.source.specs[self.key]

    def __str__(self) -> str:
        return f"{self.source.path}: {self.key!r}"


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output.

    Attributes:
        name: its name there.
        spec: its shape and type there.
        reads: what it is made from; nothing for a constant. Their shapes equal the output's unless `whole`.
        compute: takes the reads as stored (fp8 with a factor as float32) and the index of the block's first element, and
            returns the result in float32 or float64, to be rounded once. None: the first read is copied.
        whole: `compute` needs whole tensors; otherwise it is given blocks, flattened.
        propagates: see `Method`.
        why: what a dry run says about it.
    """

    name: str
    spec: Spec
    reads: tuple[Read, ...]
    compute: Callable[[Sequence[Tensor], int], Tensor] | None = None
    whole: bool = False
    propagates: bool = False
    why: str = "merge"

    @property
    def cost(self) -> int:
        """Bytes read and written."""
        return self.spec.nbytes + sum(read.spec.nbytes for read in self.reads)

    @property
    def memory(self) -> int:
        """Bytes that computing it as a whole takes, roughly: the tensors as stored, and two of them in float32.

        What adds to a tensor in pieces says itself what it takes beside them; see `sdmerge.expression.InTiles`.
        """
        room = getattr(self.compute, "room", None)
        return self.cost + 8 * self.spec.numel if room is None else int(room)


@dataclass(frozen=True)
class Plan:
    """Every step, in the order in which their inputs lie on the disk.

    Attributes:
        names: the output's tensors, in the order in which they will be listed.
        notes: what was decided on the way that the user should know.
        family: what the output is, where that is known.
        small: what else an output that is no model holds, and how it is arranged.
    """

    steps: tuple[Step, ...]
    names: tuple[str, ...]
    sources: tuple[TensorSource, ...]
    notes: tuple[str, ...] = ()
    family: str | None = None
    variant: str | None = None
    small: Written | None = None
    specs: Mapping[str, Spec] = field(init=False)

    def __post_init__(self) -> None:
        by_name = {step.name: step.spec for step in self.steps}
        object.__setattr__(self, "specs", {name: by_name[name] for name in self.names})

    @cached_property
    def cost(self) -> int:
        """Bytes read and written in all."""
        return sum(step.cost for step in self.steps)


def ordered(steps: list[Step], sources: tuple[TensorSource, ...]) -> tuple[Step, ...]:
    """Sort steps so that the first source is read from front to back; a constant comes with the step before it."""
    index = {id(source): i for i, source in enumerate(sources)}
    placed: list[tuple[tuple[int, int, int], Step]] = []
    place = (-1, 0, 0)
    for step in steps:
        if step.reads:
            first = step.reads[0]
            place = (index[id(first.source)], *first.source.position(first.key))
        placed.append((place, step))
    return tuple(step for _, step in sorted(placed, key=lambda pair: pair[0]))
