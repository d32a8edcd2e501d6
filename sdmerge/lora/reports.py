"""What became of each layer, written beside an adapter: as JSON, and as a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdformats.errors import OutputExists
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sdmerge.options import Options


def check_places(
    outputs: Iterable[Path], told: Iterable[Path | None], inputs: Iterable[Path], options: Options
) -> None:
    """Refuse places that cannot be written to, before there is work that would be lost.

    Args:
        outputs: of adapters.
        told: of reports and pictures; None: nowhere.
        inputs: what must not be replaced by a report.
        options: whether something may be replaced.

    Raises:
        RequestError: two are one file, a report is an input or a folder, or its folder does not exist.
        OutputExists: one is there.
    """
    reports = [path for path in told if path is not None]
    every = [*outputs, *reports]
    places = [path.resolve() for path in every]
    for i, path in enumerate(every):
        if places[i] in places[:i]:
            raise RequestError(f"{path}: is to be written twice (expected a name of its own for each output)")
        if path in reports and places[i] in {one.resolve() for one in inputs}:
            raise RequestError(f"{path}: is an input (expected another name for the report)")
        if path in reports and path.is_dir():
            raise RequestError(f"{path}: is a folder (expected the name of a file)")
        if not path.parent.is_dir():
            raise RequestError(f"{path}: the folder {path.parent} does not exist; create it first")
        if path.exists() and not options.overwrite:
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
