"""Paths and bounds as the functions that ``import sdmerge`` shows are given them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sdmerge.sizes import parse_size

if TYPE_CHECKING:
    from sdmerge.lora.budget import Limit

PathLike = str | os.PathLike[str]


def path_of(given: PathLike | None) -> Path | None:
    """Return a path where one is given."""
    return None if given is None else Path(given)


def limit_of(
    rank: int | None = None, size: int | str | None = None, energy: float | None = None, error: float | None = None
) -> Limit:
    """Return what bounds ranks; see `sdmerge.lora.budget.Limit`.

    Args:
        size: bytes, as a number or as ``64MB``.

    Raises:
        RequestError: several are given, or one means nothing.
    """
    from sdmerge.lora.budget import Limit

    return Limit(rank=rank, size=parse_size(size), energy=energy, error=error)
