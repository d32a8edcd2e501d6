"""What became of each layer, written beside an adapter: as JSON, and as a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdformats.output import check_place, write_file
from sdmerge import heatmap
from sdmerge.errors import RequestError
from sdmerge.lora.rank_plot import painted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from sdmerge.options import Options


def check_places(
    outputs: Sequence[Path], report: Path | None, plot: Path | None, inputs: Iterable[Path], options: Options
) -> None:
    """Refuse places that cannot be written to, before there is work that would be lost.

    Args:
        outputs: of adapters.
        report, plot: of what is told about them; None: nowhere.
        inputs: what neither may replace.
        options: whether something may be replaced.

    Raises:
        RequestError: two are one file, a report is an input or a folder, or no picture can be painted.
        WriteError: a folder does not exist.
        OutputExists: something is there.
    """
    told = [path for path in (report, plot) if path is not None]
    every = [*outputs, *told]
    places = [path.resolve() for path in every]
    read = {path.resolve() for path in inputs}
    for i, path in enumerate(every):
        if places[i] in places[:i]:
            raise RequestError(f"{path}: is to be written twice (expected a name of its own for each output)")
        if path in told and places[i] in read:
            raise RequestError(f"{path}: is an input (expected another name)")
        if path in told and path.is_dir():
            raise RequestError(f"{path}: is a folder (expected the name of a file)")
        check_place(path, overwrite=options.overwrite)
    if plot is not None:
        heatmap.check(plot, overwrite=options.overwrite, what="picture of ranks")


def write_told(told: Mapping[str, Any], report: Path | None, plot: Path | None, options: Options) -> None:
    """Write what is told.

    Args:
        told: under ``layers`` what became of each: ``rank``, ``energy`` and more; what has no rank is not painted.
        report, plot: where to; None: nowhere.
        options: whether something may be replaced.

    Raises:
        sdformats.errors.OutputExists, sdformats.errors.WriteError: they cannot be written.
    """
    if report is not None:
        text = json.dumps(told, indent=1) + "\n"
        write_file(report, text.encode(), overwrite=options.overwrite)
    if plot is not None:
        shown = {path: one for path, one in told["layers"].items() if "rank" in one}
        write_file(plot, painted(shown), overwrite=options.overwrite)
