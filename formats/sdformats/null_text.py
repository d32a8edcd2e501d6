"""Null-text inversion: the unconditional text embedding of every step of a picture's way back to noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks

_TOKENS = 77
_WIDTHS = {768: "sd1", 1024: "sd2"}


def _per_step(looks: Looks) -> bool:
    """One tensor, (steps, 1, 77, width) or (steps, 77, width)."""
    shapes = [spec.shape for spec in looks.floats.values()]
    return len(shapes) == 1 and shapes[0][1:-1] in ((1, _TOKENS), (_TOKENS,))


def _one_each(looks: Looks) -> bool:
    """A list with one tensor, (1, 77, width) or (77, width), for every step."""
    return all(spec.shape[:-1] in ((1, _TOKENS), (_TOKENS,)) for spec in looks.specs.values())


def _family(looks: Looks) -> str | None:
    return next((_WIDTHS.get(width) for width in looks.widths), None)


KIND = Kind(
    name="null-text",
    title="null-text inversion (unconditional embeddings of every step)",
    layouts=(
        Marked(name="bare", marks=(r"^$",), fits=_per_step),
        Marked(name="list", marks=(r"^\d+$",), fits=_one_each),
    ),
    family=_family,
)
