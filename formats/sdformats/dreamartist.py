"""DreamArtist: two embeddings that belong together, ``NAME`` for the prompt and ``NAME-neg`` for the negative prompt.

Each is an ordinary embedding of A1111's in a file of its own, and only their names tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NEGATIVE = "-neg"


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """Return the positive and the negative embedding that a file belongs to; None where the other one is not beside it."""
    stem, suffix = path.stem, path.suffix
    negative = stem.endswith(_NEGATIVE) and stem != _NEGATIVE
    first = path.with_name(f"{stem.removesuffix(_NEGATIVE)}{suffix}") if negative else path
    second = path if negative else path.with_name(f"{stem}{_NEGATIVE}{suffix}")
    return (first, second) if path.is_file() and first.is_file() and second.is_file() else None


def note(path: Path) -> str | None:
    """Say of one of a pair what the other is for; None where there is no other."""
    pair = pair_of(path)
    if pair is None:
        return None
    first, second = pair
    return f"a DreamArtist pair: {first.name} belongs in the prompt, {second.name} in the negative prompt"
