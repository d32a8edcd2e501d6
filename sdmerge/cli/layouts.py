"""``sdmerge layouts``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import screen

if TYPE_CHECKING:
    from sdformats.adapters.layout import AdapterLayout

_ALPHA = {"tensor": "beside the factors", "metadata": "in metadata or a config", "none": "always 1"}


@click.command("layouts")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each layout.")
def layouts(as_json: bool) -> None:
    """List the adapter layouts, and what they can hold."""
    from sdformats.adapters.layouts import LAYOUTS

    if as_json:
        screen.json([_described(layout) for layout in LAYOUTS])
        return
    rows = [
        (one.name, one.title, "yes" if one.write else "no", ", ".join(one.families) or "all", _holds(one), one.read_by)
        for one in LAYOUTS
    ]
    screen.table("", ("layout", "what it is", "written", "families", "holds", "read by"), rows)


def _holds(layout: AdapterLayout) -> str:
    return ", ".join(sorted(layout.holds)) + f"; scale {_ALPHA[layout.alpha]}"


def _described(layout: AdapterLayout) -> dict[str, Any]:
    return {
        "name": layout.name,
        "title": layout.title,
        "written_by": layout.written_by,
        "read_by": layout.read_by,
        "holds": sorted(layout.holds),
        "alpha": layout.alpha,
        "families": list(layout.families),
        "reads": True,
        "writes": layout.write is not None,
    }
