"""``sdmerge hash``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sdformats.errors import FormatError
from sdmerge.cli import screen


@click.command("hash")
@click.argument("paths", type=click.Path(), nargs=-1, required=True, metavar="PATH ...")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each path.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def hash_command(paths: tuple[str, ...], as_json: bool, quiet: bool) -> int:
    """Print the hashes by which model files are known."""
    from sdformats.files import open_source
    from sdmerge.hashing import cost, hashes

    screen.set_quiet(quiet)
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            with (
                open_source(Path(path)) as source,
                screen.progress(f"hashing {source.path.name}", cost(source)) as advance,
            ):
                found.append({"path": path, **asdict(hashes(source, advance))})
        except FormatError as error:
            found.append({"path": path, "error": str(error)})
    if as_json:
        screen.json(found)
    for entry in found:
        if "error" in entry:
            screen.error(entry["error"])
        elif not as_json:
            rows = [(name, value) for name, value in entry.items() if name != "path" and value is not None]
            screen.table(entry["path"], ("hash", "value"), rows)
    return 1 if any("error" in entry for entry in found) else 0
