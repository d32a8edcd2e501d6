"""What is to be extracted of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from sdmerge.lora.budget import Limit

Conv = Literal["flat", "tucker"]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What is to be extracted.

    Attributes:
        tuned, base: the models.
        outputs: where to write, each with its bound on the ranks.
        conv_rank: the rank of convolutions wider than a pixel, where it is another.
        conv: what such convolutions become: ``flat``, two factors; ``tucker``, thin factors and a core where that is smaller.
        to: the layout; None: the usual one of the family, or LyCORIS's, which has a place for cores.
        tolerance: how much larger than the smallest possible a layer's error may be; 0 decomposes every layer whole.
        text_encoders: whether they are looked at.
        clamp: cut factors at this quantile of their magnitudes, as some scripts do; None: not at all.
        report: where to write what became of each layer, as JSON.
        plot: where to paint ranks and errors over the layers.

    Raises:
        RequestError: a number is out of range, or `conv_rank` stands beside a bound that chooses the ranks itself.
    """

    tuned: Path
    base: Path
    outputs: tuple[tuple[Path, Limit], ...]
    conv_rank: int | None = None
    conv: Conv = "flat"
    to: str | None = None
    tolerance: float = 0.01
    text_encoders: bool = True
    clamp: float | None = None
    report: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.conv not in get_args(Conv):
            raise RequestError(f"conv is {self.conv!r} (expected one of {', '.join(get_args(Conv))})")
        if not 0 <= self.tolerance < float("inf"):
            raise RequestError(f"tolerance is {self.tolerance:g} (expected 0 or more, as in 1% or 0.01)")
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise RequestError(f"clamp is {self.clamp:g} (expected more than 0, up to 1)")
        if self.conv_rank is not None:
            if self.conv_rank < 1:
                raise RequestError(f"conv_rank is {self.conv_rank} (expected 1 or more)")
            if self.outputs[0][1].rank is None:
                chosen = next(iter(self.outputs[0][1].given))
                raise RequestError(f"conv_rank goes with a rank, and {chosen} chooses the ranks of convolutions, too")
