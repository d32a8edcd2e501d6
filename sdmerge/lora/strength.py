"""``ADAPTER:STRENGTH``, as the command line takes it."""

from __future__ import annotations

import math
from pathlib import Path

from sdmerge.errors import RequestError


def parse_strength(text: str) -> tuple[Path, float]:
    """Return the file and its strength; 1 where none is given.

    A colon may be part of a path: what stands behind the last one counts only where it is a number and the whole is no file.

    Raises:
        RequestError: the strength is not finite.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise RequestError(f"{text}: the strength is {number} (expected a finite number)")
    return Path(path), strength
