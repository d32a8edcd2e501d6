"""Converting full-size models between a diffusers folder and a single file, against the I/O floor. See README.md."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
from rich.console import Console

import sdmerge
from benchmarks.child import size_of
from benchmarks.jobs import Job, Run, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.model_files import model_files
from benchmarks.report import Result, against_floors, save, table_of, turns
from benchmarks.shapes import FAMILIES

LAYOUTS = ("single-file", "diffusers")


@click.command()
@click.option("--family", type=click.Choice(list(FAMILIES)), default="sd15", show_default=True)
@click.option(
    "--cache", type=click.Path(path_type=Path), required=True, help="Where the model's files are, or will be."
)
@click.option("--rounds", default=5, show_default=True, help="Counted rounds; one before them is not.")
@click.option("--threads", default=available_cpus(), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(family: str, cache: Path, rounds: int, threads: int, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    console = Console()
    single = model_files(FAMILIES[family], cache, report=console.print, models="a")[0]
    folder = cache / f"{family}-folder"
    if not folder.exists():
        sdmerge.convert(single, folder, to="diffusers")
    floors = [Result(Run("floor", Job.convert("floor"), overlap=overlap)) for overlap in (False, True)]
    results = [Result(Run("sdmerge", Job.convert(layout))) for layout in LAYOUTS]
    for number, result in turns((*floors, *results), rounds):
        into_folder = result.run.job.layout == "diffusers"
        source = folder if result.run.job.layout == "single-file" else single
        output = cache / ("converted" if into_folder else "converted.safetensors")
        outcome = execute(result.run, (source,), output, threads=threads)
        result.outcomes += [outcome] if number > 0 else []
        shutil.rmtree(output) if into_folder else output.unlink()
    rows = against_floors(floors, results)
    console.print(table_of(rows))
    sizes = {"single-file": size_of(single), "diffusers": size_of(folder)}
    save({"machine": describe_machine(), "family": family, "bytes": sizes, "results": rows}, json_path)


if __name__ == "__main__":
    main()
