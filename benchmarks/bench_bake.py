"""Baking LoRAs into SD1.5, against reading, writing and multiplying alone, and the usual pattern. See README.md."""

from __future__ import annotations

import importlib.util
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console

from benchmarks.adapter_files import adapter_file, flops
from benchmarks.child import GEMM
from benchmarks.jobs import Job, Run, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.model_files import model_files
from benchmarks.report import Result, save, table_of, turns
from benchmarks.shapes import FAMILIES

RANK, MOST = 128, 4
PEERS = ("usual", "peft", "lycoris")
"""The usual pattern, written out, and the two libraries."""


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where the model files are, or will be.")
@click.option("--rounds", default=3, show_default=True, help="Counted rounds; one before them is not.")
@click.option("--peer-rounds", default=1, show_default=True, help="Counted rounds of the others.")
@click.option("--threads", default=available_cpus(), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(cache: Path, rounds: int, peer_rounds: int, threads: int, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    console = Console(width=130)
    family = FAMILIES["sd15"]
    model = model_files(family, cache, report=console.print)[0]
    adapters = [adapter_file(family, RANK, cache, report=console.print, number=n) for n in range(MOST)]
    inputs, output = (model, *adapters), cache / "baked.safetensors"
    gemm = Result(Run("gemm", Job.bake(0)))
    by_count = {
        count: [
            *(Result(Run("floor", Job.bake(count), overlap=overlap)) for overlap in (False, True)),
            Result(Run("sdmerge", Job.bake(count))),
            *(
                Result(Run(tool, Job.bake(count)))
                for tool in PEERS
                if importlib.util.find_spec(tool) or tool == "usual"
            ),
        ]
        for count in (1, MOST)
    }
    for number, result in turns((gemm, *chain.from_iterable(by_count.values())), rounds):
        if result.run.tool in PEERS and number <= rounds - peer_rounds:
            continue
        outcome = execute(result.run, inputs, output, threads=threads)
        result.outcomes += [outcome] if number > 0 else []
        output.unlink(missing_ok=True)
    rate = 2 * GEMM**3 / median(gemm.seconds)
    rows = []
    for count, results in by_count.items():
        files = min(median(result.seconds) for result in results[:2])
        work = flops(family.specs(), RANK * count) / rate
        rows += [_row(result, count, files, work) for result in results[2:]]
    console.print(table_of(rows))
    save({"machine": describe_machine(), "gemm GFLOP/s": rate / 1e9, "results": rows}, json_path)


def _row(result: Result, count: int, files: float, work: float) -> dict[str, Any]:
    return {
        "tool": result.run.tool,
        "adapters": count,
        "seconds": median(result.seconds),
        "all": [round(seconds, 3) for seconds in result.seconds],
        "file floor": files,
        "gemm floor": work,
        "x floors": median(result.seconds) / (files + work),
        "resident MB over idle": round((result.resident or 0) / 1e6),
        "anonymous MB over idle": round((result.anonymous or 0) / 1e6),
    }


if __name__ == "__main__":
    main()
