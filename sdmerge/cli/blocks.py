"""``sdmerge blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import screen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdmerge.block_tables import Table

_BARS = "▁▂▃▄▅▆▇█"


@click.command("blocks")
@click.argument("family", required=False)
@click.option("--presets", is_flag=True, help="List the block weights that go by a name instead.")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def blocks(family: str | None, presets: bool, as_json: bool) -> int:
    """Show which tensors each block of a family holds."""
    if presets:
        if family is not None:
            raise click.UsageError(f"--presets is for all families; leave {family} out")
        return _presets(as_json)
    from sdformats.layout import FAMILIES

    if family is None:
        raise click.UsageError(f"name a family, one of {', '.join(FAMILIES)}, or give --presets")
    from sdmerge.block_tables import table

    found = table(family.lower())
    if as_json:
        screen.json(_as_data(found))
        return 0
    rows = [
        (row.name, _patterns(row.single_file), _patterns(row.diffusers), "-" if row.tensors is None else row.tensors)
        for row in found.rows
    ]
    columns = ("block", "single file", "diffusers", "tensors")
    screen.table(f"{found.family}: lists of {_counts(found)} weights", columns, rows, right=("tensors",))
    screen.say(
        "Names are those inside the network, BASE's and the VAE's whole; tensors are those of a full single file."
    )
    return 0


def _presets(as_json: bool) -> int:
    from sdmerge.presets import PRESETS

    if as_json:
        screen.json({name: list(values) for name, values in PRESETS.items()})
        return 0
    rows = [(name, spark(values[:1]), spark(values[1:])) for name, values in PRESETS.items()]
    screen.table("", ("preset", "BASE", "IN00 to OUT11"), rows)
    return 0


def spark(values: Sequence[float]) -> str:
    """Draw numbers from 0 to 1 as a line of bars."""
    top = len(_BARS) - 1
    return "".join(_BARS[round(min(max(value, 0.0), 1.0) * top)] for value in values)


def _patterns(starts: Sequence[str]) -> str:
    return " ".join(f"{start}*" for start in starts)


def _counts(found: Table) -> str:
    return " or ".join(map(str, found.forms))


def _as_data(found: Table) -> dict[str, Any]:
    return {
        "family": found.family,
        "counts": list(found.forms),
        "blocks": [
            {
                "block": row.name,
                "single_file": [f"{start}*" for start in row.single_file],
                "diffusers": [f"{start}*" for start in row.diffusers],
                "tensors": row.tensors,
            }
            for row in found.rows
        ],
        "aliases": {name: list(names) for name, names in found.aliases.items()},
    }
