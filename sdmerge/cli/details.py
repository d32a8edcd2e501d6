"""What `inspect` shows people about each kind of file, in rows of a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_ENCODERS = {
    "clip_l": "CLIP-L",
    "clip_g": "OpenCLIP-bigG",
    "t5": "T5-XXL",
    "open_clip": "OpenCLIP-H",
    "bert": "LDM's BERT",
}
_BARS = "▁▂▃▄▅▆▇█"
_LONGEST_BARS = 64
_TOLD = ("name", "step", "sd_checkpoint", "sd_checkpoint_name", "string_to_token", "string_to_param")
Rows = list[tuple[str, str]]


def rows_of(entry: dict[str, Any]) -> Rows:
    """Return what there is to say about an entry of `inspection.inspect_path` beyond its tensors."""
    if "algorithms" in entry:
        return _adapter(entry)
    found = entry.get("details")
    if not found:
        return []
    return _embedding(entry["path"], found) if entry["kind"] == "embedding" else _any(found)


def told_in_rows(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the texts of a file that `rows_of` has told already."""
    return _TOLD if entry["kind"] == "embedding" and entry.get("details") else ()


def _adapter(entry: dict[str, Any]) -> Rows:
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


def _embedding(path: str, found: dict[str, Any]) -> Rows:
    stem = Path(path).stem
    rows: Rows = []
    for word in found["words"]:
        rows.append(("word", word["token"] or f"{stem} (programs go by the file's name)"))
        rows += [("  vectors", _vectors(encoder, shape)) for encoder, shape in word["vectors"].items()]
        rows += [("  behind it", _vectors(encoder, shape)) for encoder, shape in word["outputs"].items()]
        rows += [("  norms", _norms(encoder, norms)) for encoder, norms in word["norms"].items() if norms]
    if found["name"] and found["name"] != stem:
        rows.append(("name inside", found["name"]))
    if found["step"] is not None:
        rows.append(("trained", f"{found['step']:,} steps"))
    if found["trained_on"] or found["checkpoint_hash"]:
        told = [found["trained_on"], f"[{found['checkpoint_hash']}]" if found["checkpoint_hash"] else None]
        rows.append(("trained on", " ".join(text for text in told if text)))
    return [*rows, ("trainer", found["trainer"] or "unknown")]


def _vectors(encoder: str, shape: list[int]) -> str:
    count, width = shape
    return f"{count} for {_ENCODERS[encoder]} ({width} wide)"


def _norms(encoder: str, norms: list[float | None]) -> str:
    """Draw the vectors' lengths, and say how long they are."""
    finite = [norm for norm in norms if norm is not None]
    if not finite:
        return "not finite"
    low, high = min(finite), max(finite)
    said = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    if len(norms) == 1:
        return f"{said} ({_ENCODERS[encoder]})"
    top = high or 1.0
    bars = "".join(
        "?" if norm is None else _BARS[min(len(_BARS) - 1, math.floor(norm / top * len(_BARS)))]
        for norm in norms[:_LONGEST_BARS]
    )
    return f"{bars}{'…' if len(norms) > _LONGEST_BARS else ''} {said} ({_ENCODERS[encoder]})"


def _any(found: dict[str, Any]) -> Rows:
    return [(key.replace("_", " "), _said(value)) for key, value in found.items() if value not in (None, [], {})]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_said(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_said(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
