"""Aesthetic embeddings: the mean of some pictures' CLIP features, a single vector without a name.

A textual-inversion embedding of one vector can look the same; see `kind`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks

_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
"""The features of CLIP-L, OpenCLIP-H and OpenCLIP-bigG."""


def _one_vector(looks: Looks) -> bool:
    return all(spec.shape in ((width,), (1, width)) for spec in looks.floats.values() for width in looks.widths)


def _known_width(looks: Looks) -> bool:
    return len(looks.floats) == 1 and looks.widths <= _WIDTHS.keys() and _one_vector(looks)


def _family(looks: Looks) -> str | None:
    return next((_WIDTHS[width] for width in looks.widths), None)


KIND = Kind(
    name="aesthetic",
    title="an aesthetic embedding (the mean of pictures' CLIP features)",
    layouts=(Marked(name="bare", marks=(r"^$",), fits=_known_width),),
    family=_family,
)
