"""How an embedding is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.embeddings.layouts import LAYOUTS
from sdformats.kind import Kind

if TYPE_CHECKING:
    from sdformats.kind import Looks

_FAMILIES = {
    frozenset({768}): "sd1",
    frozenset({1024}): "sd2",
    frozenset({768, 1280}): "sdxl",
    frozenset({768, 1280, 4096}): "sd3",
    frozenset({768, 4096}): "flux",
}


def _family(looks: Looks) -> str | None:
    return _FAMILIES.get(looks.widths)


KIND = Kind(name="embedding", title="a textual-inversion embedding", layouts=LAYOUTS, family=_family)
