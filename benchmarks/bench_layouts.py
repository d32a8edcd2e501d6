"""Converting a full-size SDXL LoRA between layouts, against merely reading and writing as many bytes. See README.md."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
from rich.console import Console

from benchmarks.adapter_files import adapter_file
from benchmarks.jobs import Job, Run, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.report import Result, against_floors, save, table_of, turns
from benchmarks.shapes import FAMILIES
from sdformats.adapters.layouts import LAYOUTS

RANK = 256


def targets() -> list[str]:
    """Return the layouts that can hold the file."""
    return [
        layout.name
        for layout in LAYOUTS
        if layout.write is not None and "locon" in layout.holds and (not layout.families or "sdxl" in layout.families)
    ]


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where the model file is, or will be.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds; one before them is not.")
@click.option("--threads", default=available_cpus(), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(cache: Path, rounds: int, threads: int, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    console = Console()
    source = adapter_file(FAMILIES["sdxl"], RANK, cache, report=console.print)
    floors = [Result(Run("floor", Job.convert("floor"), overlap=overlap)) for overlap in (False, True)]
    results = [Result(Run("sdmerge", Job.convert(layout))) for layout in targets()]
    for number, result in turns((*floors, *results), rounds):
        folder = result.run.job.layout == "peft"
        output = cache / ("converted" if folder else "converted.safetensors")
        outcome = execute(result.run, (source,), output, threads=threads)
        result.outcomes += [outcome] if number > 0 else []
        shutil.rmtree(output) if folder else output.unlink()
    rows = against_floors(floors, results)
    console.print(table_of(rows))
    save({"machine": describe_machine(), "bytes": source.stat().st_size, "results": rows}, json_path)


if __name__ == "__main__":
    main()
