"""Resizing a full-size SDXL LoRA, against the SVD of each layer's whole change, in one run. See README.md."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.adapter_files import adapter_file
from benchmarks.measure import describe_machine, measure
from benchmarks.report import save
from benchmarks.shapes import FAMILIES
from sdformats.adapters import open_adapter
from sdformats.adapters.records import LoRA
from sdformats.files import open_source
from sdmerge import adapters
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from sdformats.adapters.adapter import Adapter

BEFORE, AFTER = 128, 32


def shape_of(record: LoRA) -> tuple[int, int]:
    return record.height, record.columns


def whole_svd(record: LoRA, *, thin: bool) -> tuple[float, float]:
    """Return the seconds of up · down and its SVD, and the relative error of what is cut off it."""
    up, down = value(record.up).flatten(1), value(record.down).flatten(1)
    start = time.perf_counter()
    _, sigma, _ = torch.linalg.svd(up @ down, full_matrices=not thin)
    seconds = time.perf_counter() - start
    squares = sigma.double().square()
    return seconds, float((squares[AFTER:].sum() / squares.sum()).sqrt())


def measured(adapter: Adapter, errors: dict[str, float], *, thin: bool, report: Any) -> list[dict[str, Any]]:
    """Decompose one layer of each shape."""
    loras = {path: record for path, record in adapter.modules.items() if isinstance(record, LoRA)}
    counts = Counter(shape_of(record) for record in loras.values())
    rows = []
    for shape, count in sorted(counts.items()):
        path, record = next((path, record) for path, record in loras.items() if shape_of(record) == shape)
        seconds, error = whole_svd(record, thin=thin)
        report(f"{shape[0]} x {shape[1]}: {seconds:.3f} s, {count} layers")
        rows.append({
            "shape": list(shape), "layers": count, "svd seconds": seconds,
            "error": errors[path], "off by": abs(errors[path] / error - 1),
        })  # fmt: skip
    return rows


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where the model file is, or will be.")
@click.option("--rounds", default=3, show_default=True, help="Counted rounds; one before them is not.")
@click.option("--thin", is_flag=True, help="Compare with the thin SVD, not with what tools call.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(cache: Path, rounds: int, thin: bool, json_path: Path | None) -> None:
    """Measure with one thread, print a table, write JSON."""
    console = Console()
    source = adapter_file(FAMILIES["sdxl"], BEFORE, cache, report=console.print)
    output, report_path = cache / "resized.safetensors", cache / "resized.json"
    costs = []
    for number in range(rounds + 1):
        cost = measure(
            lambda: adapters.resize_lora(source, output, rank=AFTER, threads=1, report=report_path, overwrite=True)
        )
        costs += [cost] if number else []
    seconds = sorted(cost.seconds for cost in costs)[len(costs) // 2]
    errors = {path: entry["error"] for path, entry in json.loads(report_path.read_text())["layers"].items()}
    torch.set_num_threads(1)
    with open_source(source) as opened:
        rows = measured(open_adapter(opened)[0], errors, thin=thin, report=console.print)
    found = {
        "machine": describe_machine(),
        "ranks": [BEFORE, AFTER],
        "resize seconds": [round(cost.seconds, 3) for cost in costs],
        "resident MB over idle": round(max(cost.resident or 0 for cost in costs) / 1e6),
        "svd": "thin" if thin else "full",
        "svd seconds": sum(row["svd seconds"] * row["layers"] for row in rows),
        "largest difference of errors": max(row["off by"] for row in rows),
    }
    found["times faster"] = found["svd seconds"] / seconds
    table = Table("shape", "layers", "SVD s", "error", "off by")
    for row in rows:
        m, n = row["shape"]
        table.add_row(f"{m} x {n}", str(row["layers"]), f"{row['svd seconds']:.3f}", f"{row['error']:.6f}",
                      f"{row['off by']:.1e}")  # fmt: skip
    console.print(table)
    console.print_json(json.dumps(found))
    output.unlink()
    report_path.unlink()
    save(found | {"shapes": rows}, json_path)


if __name__ == "__main__":
    main()
