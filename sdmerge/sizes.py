"""Sizes as users write them."""

from __future__ import annotations

import re

from sdmerge.errors import RequestError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str | int | None) -> int | None:
    """Return a number of bytes: ``64MB``, ``64MiB``, ``64000000``; None where nothing is said.

    Raises:
        RequestError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)", str(text).strip())
    if found is None or found[2].upper() not in _UNITS:
        raise RequestError(f"size is {text!r} (expected bytes, as 64MB or 64MiB)")
    return int(float(found[1]) * _UNITS[found[2].upper()])
