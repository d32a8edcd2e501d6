"""How a hypernetwork is known, and in which layout."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks

NAME = re.compile(r"(\d{1,6})\.([01])\.(linear(?:[12]|\.\d{1,3}))\.(weight|bias)")
"""A tensor's: width, side (0 for keys, 1 for values), layer, and what of it."""
_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""The widths of the text that cross-attention reads."""


def _family(looks: Looks) -> str | None:
    found = {_CONTEXTS[width] for name in looks.specs if (width := int(name.partition(".")[0])) in _CONTEXTS}
    return found.pop() if len(found) == 1 else None


def _some_variant(looks: Looks) -> bool:
    return any(".linear" in name for name in looks.specs) and any(not NAME.fullmatch(name) for name in looks.specs)


KIND = Kind(
    name="hypernetwork",
    title="a hypernetwork",
    layouts=(
        Marked(name="a1111", marks=(r"^\d{1,6}\.[01]\.linear\.\d{1,3}\.(weight|bias)$",)),
        Marked(name="novelai", marks=(r"^\d{1,6}\.[01]\.linear[12]\.(weight|bias)$",)),
        Marked(name="unknown variant", marks=(r"^\d{1,6}\.[01]\.",), fits=_some_variant),
    ),
    family=_family,
)
