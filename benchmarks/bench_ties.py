"""TIES over three full-size checkpoints, against this project's own add-difference and sd-mecha's TIES. See README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.jobs import ADD_FULL, Job, Run, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.model_files import model_files
from benchmarks.report import Result, save, table_of, turns
from benchmarks.shapes import FAMILIES


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where the model files are, or will be.")
@click.option("--rounds", default=3, show_default=True, help="Counted runs of sdmerge; one before them is not.")
@click.option("--threads", default=available_cpus(), show_default=True)
@click.option("--peer-python", help="An interpreter that has sd-mecha: it is run once.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(cache: Path, rounds: int, threads: int, peer_python: str | None, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    console = Console()
    inputs = model_files(FAMILIES["sd15"], cache, report=console.print)
    output = cache / "ties.safetensors"
    results = [Result(Run("sdmerge", ADD_FULL)), Result(Run("sdmerge", Job.ties()))]
    for number, result in turns(results, rounds):
        outcome = execute(result.run, inputs, output, threads=threads)
        result.outcomes += [outcome] if number > 0 else []
        output.unlink()
    if peer_python:
        peer = Result(Run("sd-mecha", Job.ties()))
        peer.outcomes.append(execute(peer.run, inputs, output, threads=threads, python=peer_python))
        results.append(peer)
        output.unlink(missing_ok=True)
    rows = [_row(result, results[0].median or 1.0) for result in results]
    console.print(table_of(rows))
    save({"machine": describe_machine(), "results": rows}, json_path)


def _row(result: Result, unit: float) -> dict[str, Any]:
    return {
        "tool": result.run.tool,
        "job": result.run.label,
        "seconds": result.median,
        "all": result.seconds,
        "x add-diff": (result.median or 0.0) / unit,
        "resident MB over idle": round((result.resident or 0) / 1e6),
        "version": result.outcomes[0].version,
    }


if __name__ == "__main__":
    main()
