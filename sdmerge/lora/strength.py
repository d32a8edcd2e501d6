"""Adapters with their strengths, as the command line takes them: ``style.safetensors:0.7``."""

from __future__ import annotations

import math
from pathlib import Path


def parse_strength(text: str) -> tuple[Path, float]:
    """Take ``ADAPTER:STRENGTH`` apart; without a strength it is 1.

    Only a number behind the last colon is a strength, and not where a file of the whole name exists: names, and Windows'
    drives, may have colons too.
    """
    name, colon, rest = text.rpartition(":")
    strength = _number(rest)
    if not colon or not name or strength is None or Path(text).exists():
        return Path(text), 1.0
    return Path(name), strength


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
