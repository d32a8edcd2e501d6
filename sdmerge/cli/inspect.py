"""``sdmerge inspect``."""

from __future__ import annotations

from typing import Any

import click

from sdformats.errors import FormatError
from sdmerge.cli import screen

_SHORT = 80


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
        ("container", entry["container"] + (f", {entry['layout']} names" if entry["layout"] else "")),
        ("size", f"{screen.human(entry['bytes'])}, {entry['tensors']:,} tensors"),
        ("parameters", f"{entry['parameters']:,}"),
        *((f"  {part}", f"{count:,}") for part, count in entry["components"].items()),
        *_adapter(entry),
        ("types", ", ".join(f"{dtype} {count:,}" for dtype, count in entry["dtypes"].items()) or "none"),
    ]
    if entry["metadata"]:
        rows.append(("metadata", f"{len(entry['metadata']):,} texts"))
        rows += [(f"  {key}", _shortened(value)) for key, value in sorted(entry["metadata"].items())]
    screen.table(entry["path"], ("field", "value"), rows)
    for warning in entry["warnings"]:
        screen.warn(warning)
    if "list" in entry:
        listed = [(t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar") for t in entry["list"]]
        screen.table("", ("tensor", "type", "shape"), listed)


def _what(entry: dict[str, Any]) -> str:
    if "title" not in entry:
        return " ".join(str(entry[key]) for key in ("family", "variant", "kind") if entry[key] and entry[key] != "base")
    return f"{entry['title']} for {entry['family']}" if entry["family"] else str(entry["title"])


def _adapter(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to say about an adapter."""
    if "algorithms" not in entry:
        return []
    rows = [("algorithms", ", ".join(entry["algorithms"])), ("modules", f"{entry['modules']:,}")]
    for name in ("ranks", "alphas"):
        spread = entry[name]
        rows.append((name, "unknown" if spread is None else _spread(spread)))
    rows.append(("blocks", ", ".join(f"{block} {count}" for block, count in entry["blocks"].items())))
    return rows + ([("embeddings", ", ".join(entry["embeddings"]))] if entry["embeddings"] else [])


def _spread(spread: dict[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:g}"
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}"


def _shortened(value: str) -> str:
    return value if len(value) <= _SHORT else f"{value[:_SHORT]}... ({len(value):,} characters)"
