"""What became of each layer, written beside an adapter: as JSON, and as a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdformats.errors import OutputExists

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sdmerge.options import Options


def check_new(paths: Iterable[Path | None], options: Options) -> None:
    """Refuse to replace files, unless that is allowed, before there is work that would be lost.

    Raises:
        OutputExists: one is there.
    """
    for path in paths:
        if path is not None and path.exists() and not options.overwrite:
            raise OutputExists("exists already", path=path, advice="pass --overwrite, or choose another name")


def write_told(told: Mapping[str, Any], report: Path | None, plot: Path | None) -> None:
    """Write what is told.

    Args:
        told: under ``layers`` what became of each: ``rank``, ``energy`` and more; what has no rank is not painted.
        report, plot: where to; None: nowhere.
    """
    if report is not None:
        report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from sdmerge.lora.rank_plot import paint

        paint(plot, {path: one for path, one in told["layers"].items() if "rank" in one})
