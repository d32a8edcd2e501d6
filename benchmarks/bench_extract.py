"""Extracting a LoRA from two whole files: time, and memory over an idle process. See README.md."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console

from benchmarks.jobs import Job, Run, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.model_files import model_files, tuned_file
from benchmarks.report import save
from benchmarks.shapes import FAMILIES


@click.command()
@click.option("--family", type=click.Choice(list(FAMILIES)), default="sdxl", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where the model files are, or will be.")
@click.option("--rank", default=64, show_default=True)
@click.option("--rounds", default=1, show_default=True)
@click.option("--threads", default=available_cpus(), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(family: str, cache: Path, rank: int, rounds: int, threads: int, json_path: Path | None) -> None:
    """Measure, print, write JSON."""
    console = Console()
    base = model_files(FAMILIES[family], cache, report=console.print, models="a")[0]
    tuned = tuned_file(FAMILIES[family], base, report=console.print)
    output = cache / "extracted.safetensors"
    runs = []
    for _ in range(rounds):
        runs.append(execute(Run("sdmerge", Job.extract(rank)), (tuned, base), output, threads=threads).measurement)
        size = output.stat().st_size
        output.unlink()
    found: dict[str, Any] = {
        "family": family,
        "rank": rank,
        "threads": threads,
        "seconds": median(run.seconds for run in runs),
        "all": [round(run.seconds, 1) for run in runs],
        "resident MB over idle": round(max(run.resident or 0 for run in runs) / 1e6),
        "anonymous MB over idle": round(max(run.anonymous or 0 for run in runs) / 1e6),
        "output MB": round(size / 1e6),
    }
    console.print(found)
    save({"machine": describe_machine(), **found}, json_path)


if __name__ == "__main__":
    main()
