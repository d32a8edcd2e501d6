"""``sdmerge inspect``."""

from __future__ import annotations

from typing import Any

import click

from sdformats.errors import FormatError
from sdmerge.cli import screen
from sdmerge.cli.details import rows_of, told_in_rows

_SHORT = 80
_MOST_TEXTS = 80


@click.command("inspect")
@click.argument("paths", type=click.Path(), nargs=-1, required=True, metavar="PATH ...")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each path.")
@click.option("--tensors", is_flag=True, help="List every tensor too.")
@click.option("--family", help="What the model is, where its structure does not tell.")
@click.option("--as", "kind", metavar="KIND", help="What the file is, where it could be several things: aesthetic, ...")
def inspect(paths: tuple[str, ...], as_json: bool, tensors: bool, family: str | None, kind: str | None) -> int:
    """Say what a model file is and holds."""
    from sdmerge.inspection import inspect_path

    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            found.append(inspect_path(path, family=family, kind=kind, tensors=tensors))
        except FormatError as error:
            found.append({"path": path, "error": str(error)})
    if as_json:
        screen.json(found)
    for entry in found:
        if "error" in entry:
            screen.error(entry["error"])
        elif not as_json:
            _show(entry)
    return 1 if any("error" in entry for entry in found) else 0


def _show(entry: dict[str, Any]) -> None:
    rows = [
        ("what", _what(entry)),
        ("container", entry["container"] + _layout(entry)),
        ("size", f"{screen.human(entry['bytes'])}, {entry['tensors']:,} tensor{'s' if entry['tensors'] != 1 else ''}"),
        ("parameters", f"{entry['parameters']:,}"),
        *((f"  {part}", f"{count:,}") for part, count in entry["components"].items()),
        *rows_of(entry),
        ("types", ", ".join(f"{dtype} {count:,}" for dtype, count in entry["dtypes"].items()) or "none"),
    ]
    texts = [(key, value) for key, value in sorted(entry["metadata"].items()) if key not in told_in_rows(entry)]
    if texts:
        rows.append(("metadata", f"{len(texts):,} text{'s' if len(texts) > 1 else ''}"))
        rows += [(f"  {key}", _shortened(value)) for key, value in texts[:_MOST_TEXTS]]
    if len(texts) > _MOST_TEXTS:
        rows.append(("  ...", f"{len(texts) - _MOST_TEXTS:,} more; --json shows all"))
    screen.table(entry["path"], ("field", "value"), rows)
    for warning in entry["warnings"]:
        screen.warn(warning)
    if "list" in entry:
        listed = [(t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar") for t in entry["list"]]
        screen.table("", ("tensor", "type", "shape"), listed)


def _what(entry: dict[str, Any]) -> str:
    if "title" not in entry:
        return " ".join(str(entry[key]) for key in ("family", "variant", "kind") if entry[key] and entry[key] != "base")
    return f"{entry['family']}: {entry['title']}" if entry["family"] else str(entry["title"])


def _layout(entry: dict[str, Any]) -> str:
    if not entry["layout"]:
        return ""
    return f", {entry['layout']} {'names' if 'details' not in entry else 'layout'}"


def _shortened(value: str) -> str:
    return value if len(value) <= _SHORT else f"{value[:_SHORT]}... ({len(value):,} characters)"
