"""The main job against the I/O floor, sd-mecha and mergekit. See README.md beside this file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks.exactness import check as check_exactness
from benchmarks.jobs import JOBS, PEER_JOBS, Run, RunError, execute
from benchmarks.measure import available_cpus, describe_machine
from benchmarks.model_files import model_files
from benchmarks.report import Comparison, Result, save, turns
from benchmarks.shapes import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PEERS = {"sd-mecha": "sd_mecha", "mergekit": "mergekit"}
TOOLS = ("floor", "sdmerge", *PEERS)
PAGE_CACHE = ("auto", "warm", "as-is", "cold")
WARM_SHARE = 0.6
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asks for."""

    cache: Path
    page_cache: str
    rounds: int
    peer_rounds: int
    threads: int
    tools: tuple[str, ...]
    pythons: dict[str, str]
    check: bool

    def rounds_of(self, tool: str) -> int:
        """How many runs of a tool are counted."""
        return self.peer_rounds if tool in PEERS else self.rounds


def planned_runs(tools: Sequence[str]) -> list[Run]:
    """List what one round runs, in order: floors between the merges, so that all see the same machine."""
    runs: list[Run] = []
    for job in JOBS:
        if "floor" in tools and all(run.job.models != job.models for run in runs):
            runs += [Run("floor", job), Run("floor", job, overlap=True)]
        if "sdmerge" in tools:
            runs.append(Run("sdmerge", job))
    return runs + [Run(tool, job) for tool in PEERS if tool in tools for job in PEER_JOBS]


def compare(family: Family, settings: Settings, progress: Progress) -> Comparison:
    """Measure one family: one round that does not count, then the counted ones."""
    inputs = model_files(family, settings.cache, report=progress.console.print)
    size = inputs[0].stat().st_size
    page_cache = settings.page_cache if settings.page_cache != "auto" else _choose_page_cache(size)
    results = [Result(run) for run in planned_runs(settings.tools)]
    total = sum(1 + settings.rounds_of(result.run.tool) for result in results)
    task = progress.add_task(family.title, total=total)
    for number, result in turns(results, max(settings.rounds, settings.peer_rounds)):
        if number > settings.rounds_of(result.run.tool) or result.failure:
            continue
        progress.update(task, description=f"{family.title}: {result.run.tool}, {result.run.label}")
        _run(result, inputs, settings, page_cache, counted=number > 0)
        progress.advance(task)
    return Comparison(family.name, family.title, size, page_cache, results)


def _run(result: Result, inputs: tuple[Path, ...], settings: Settings, page_cache: str, *, counted: bool) -> None:
    run = result.run
    with _scratch(settings.cache) as folder:
        prepare_page_cache(inputs[: run.job.models], page_cache)
        python = settings.pythons.get(run.tool, sys.executable)
        output = folder / "merged.safetensors"
        try:
            outcome = execute(run, inputs, output, threads=settings.threads, python=python)
        except RunError as error:
            result.failure = str(error)
            return
        outputs = sorted(folder.rglob("*.safetensors"))
        written = sum(path.stat().st_size for path in outputs)
        if written < 0.9 * inputs[0].stat().st_size:
            result.failure = f"wrote {written:,} bytes only"
        elif counted:
            result.outcomes.append(outcome)
        elif settings.check and run.tool != "floor":
            result.exactness = check_exactness(run.job, inputs, outputs)


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Provide an empty folder on the inputs' disk, when nothing else waits to be written there."""
    folder = cache / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if hasattr(os, "sync"):
        os.sync()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _choose_page_cache(size: int) -> str:
    """Warm where three inputs and an output leave the machine room, otherwise as it comes."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return "as-is"
    return "warm" if 4 * size < WARM_SHARE * memory else "as-is"


def prepare_page_cache(inputs: Sequence[Path], state: str) -> None:
    """Bring the files into the page cache (``warm``), out of it (``cold``), or leave it alone (``as-is``)."""
    buffer = bytearray(_BUFFER)
    for path in inputs if state != "as-is" else ():
        with path.open("rb", buffering=0) as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.readinto(buffer):
                pass


def default_cache() -> Path:
    """``sdmerge-bench`` in the user's cache folder."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sdmerge-bench"


def available_tools(asked: Sequence[str], pythons: dict[str, str], console: Console) -> tuple[str, ...]:
    """Return the tools to measure, with a word about each that is not there."""
    found = []
    for tool in asked or TOOLS:
        if tool not in PEERS or tool in pythons or importlib.util.find_spec(PEERS[tool]) is not None:
            found.append(tool)
        else:
            advice = f"pip install '.\\[bench]', or --peer-python {tool}=PATH"
            console.print(f"{tool} is not installed here, and is left out ({advice})")
    return tuple(found)


def _parse_pythons(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pythons = {}
    for value in values:
        name, _separator, path = value.partition("=")
        if name not in PEERS or not shutil.which(path):
            raise click.BadParameter(f"{value!r} is not {' or '.join(PEERS)}, an equals sign and a python")
        pythons[name] = path
    return pythons


@click.command()
@click.option("--family", "families", type=click.Choice(list(FAMILIES)), multiple=True, help="Files. [all]")
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, help="Tools. [all that are there]")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Counted runs of each.")
@click.option("--peer-rounds", type=click.IntRange(1), help="Counted runs of each peer. [as --rounds]")
@click.option("--threads", type=click.IntRange(1), help="For the floor and sdmerge. [one for each CPU]")
@click.option("--cache", type=click.Path(path_type=Path), help="Where the files lie (35 GB with an output).")
@click.option("--page-cache", type=click.Choice(PAGE_CACHE), default="auto", show_default=True)
@click.option("--peer-python", "pythons", multiple=True, metavar="NAME=PATH", callback=_parse_pythons)
@click.option("--check", is_flag=True, help="Compare the uncounted outputs with exact arithmetic.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the numbers.")
def main(families: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure merges of full-size checkpoints against the I/O floor and against other tools."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    settings = _settings(console, **options)
    comparisons = []
    with Progress(console=console, transient=True) as progress:
        for name in families or FAMILIES:
            comparisons.append(compare(FAMILIES[name], settings, progress))
            console.print(comparisons[-1].table())
            for result in comparisons[-1].results:
                if result.failure:
                    console.print(result.failure, style="red", markup=False)
    save(_document(settings, comparisons), json_path)
    _fail_where_wrong(comparisons)


def _settings(
    console: Console,
    *,
    cache: Path | None,
    rounds: int,
    peer_rounds: int | None,
    threads: int | None,
    tools: tuple[str, ...],
    pythons: dict[str, str],
    page_cache: str,
    check: bool,
) -> Settings:
    return Settings(
        cache=cache or default_cache(),
        page_cache=page_cache,
        rounds=rounds,
        peer_rounds=peer_rounds or rounds,
        threads=threads or available_cpus(),
        tools=available_tools(tools, pythons, console),
        pythons=pythons,
        check=check,
    )


def _document(settings: Settings, comparisons: Sequence[Comparison]) -> dict[str, object]:
    machine = describe_machine() | {"torch": importlib.metadata.version("torch")}
    return {
        "machine": machine,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "peer_rounds": settings.peer_rounds,
        "families": [comparison.to_json() for comparison in comparisons],
    }


def _fail_where_wrong(comparisons: Sequence[Comparison]) -> None:
    """Exit 1 when a run failed, or sdmerge was not exact."""
    for comparison in comparisons:
        for result in comparison.results:
            what = f"{comparison.title}: {result.run.tool}, {result.run.label}"
            if result.failure:
                raise click.ClickException(f"{what}: failed, see above")
            if result.run.tool == "sdmerge" and result.exactness is not None and not result.exactness.ok:
                raise click.ClickException(f"{what}: is not exact: {result.exactness}")


if __name__ == "__main__":
    main()
