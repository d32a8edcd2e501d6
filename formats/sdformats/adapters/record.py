"""What every record of a trained module has; the algorithms are in `records`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sdformats.views import Ref


@dataclass(frozen=True)
class Magnitude:
    """DoRA's lengths: W' = m (W + s Δ) / ‖W + s Δ‖.

    Attributes:
        values: one for each row of the weight, (out, 1, …), or for each column, (1, in, …).
        axis: which of them: ``out`` norms each row, ``in`` each column.
    """

    values: Ref
    axis: Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is trained for one module.

    Attributes:
        alpha: the change is multiplied with alpha / rank; None: with 1.
        magnitude: DoRA's lengths, where it is one.
        bias: what is added to the module's bias.
    """

    algorithm: ClassVar[str]
    alpha: float | None = None
    magnitude: Magnitude | None = None
    bias: Ref | None = None

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where the algorithm has none."""
        return None

    @property
    def scale(self) -> float:
        """What the change is multiplied with."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def columns(self) -> int | None:
        """How many inputs the module has (times the kernel's size), where the record tells."""
        return None

    @property
    def height(self) -> int | None:
        """How many rows the module's matrix has, where the record tells."""
        return None if self.bias is None else self.bias.shape[0]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]] | None:
        """The fields that carry the module's rows: their axis, and rows of the module for each of theirs.

        None where no range of rows can be cut out of the factors.
        """
        return None

    @property
    def refs(self) -> Iterator[tuple[str, Ref]]:
        """Every tensor, by the name of its field."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Magnitude):
                yield item.name, value.values
            elif value is not None and hasattr(value, "spec"):
                yield item.name, value

    def map(self, change: Callable[[Ref], Ref]) -> Record:
        """Return the record with every tensor changed."""
        changed: dict[str, object] = {name: change(ref) for name, ref in self.refs}
        if self.magnitude is not None:
            changed["magnitude"] = dataclasses.replace(self.magnitude, values=change(self.magnitude.values))
        return dataclasses.replace(self, **changed)  # type: ignore[arg-type]
