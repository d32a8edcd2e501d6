"""Each kernel and the plain torch expression against a copy of the same bytes on the same device. See README.md."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sdkernels
from benchmarks.kernel_cases import LARGE
from benchmarks.measure import describe_machine
from benchmarks.report import ratio, save, turns
from sdkernels.kernel import HAS_TRITON, defined_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdkernels.kernel import Case, Kernel

DEFAULT_MIB = {"cpu": 64, "cuda": 1024}
RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 2
Contenders = dict[str, "Callable[[], object]"]


@dataclass(slots=True)
class Timing:
    """All counted runs of one kernel's versions over one case.

    Args:
        kernel: its name.
        case: what it computed.
        moved: bytes that the case reads and writes, each once.
        seconds: for ``copy`` and each version, the time of each run.
    """

    kernel: str
    case: str
    moved: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, version: str) -> float | None:
        """Median time of a version in seconds, if it was measured."""
        found = self.seconds.get(version)
        return statistics.median(found) if found else None

    def share(self, version: str) -> float | None:
        """Bytes per second of a version, as a part of the copy's."""
        return ratio(self.median("copy"), self.median(version))

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        versions = {
            name: {"median_seconds": self.median(name), "seconds": runs, "of_copy": self.share(name)}
            for name, runs in self.seconds.items()
        }
        return {"kernel": self.kernel, "case": self.case, "bytes": self.moved, "versions": versions}


def kernels() -> Iterator[Kernel]:
    """Every kernel that the package has."""
    for name in sdkernels.__all__:
        yield from defined_in(getattr(sdkernels, name))


def large_case(kernel: Kernel, moved: int) -> tuple[Case, Callable[..., Any] | None] | None:
    """Return the case to time and the plain expression: the kernel's own, else those of the table here."""
    large, plain = LARGE.get(kernel.name, (None, None))
    large, plain = kernel.large or large, kernel.plain or plain
    return None if large is None else (large(moved), plain)


def contenders(kernel: Kernel, moved: int, device: torch.device) -> tuple[Timing, Contenders] | None:
    """Return what is timed by turns; None for a kernel without a large case."""
    found = large_case(kernel, moved)
    if found is None:
        return None
    case, plain = found
    arguments = case.make(device)
    source = torch.ones(case.moved // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls: Contenders = {"copy": functools.partial(target.copy_, source)}
    if device.type == "cuda" and HAS_TRITON:
        calls["fast"] = functools.partial(kernel.fast, *arguments)
    if device.type == "cpu":
        calls["reference"] = functools.partial(kernel.reference, *arguments)
    if plain is not None:
        calls["plain"] = functools.partial(plain, *arguments)
    return Timing(kernel.name, case.name, case.moved), calls


def measure(timing: Timing, calls: Contenders, rounds: int, device: torch.device) -> None:
    """Run all by turns."""
    timing.seconds = {name: [] for name in calls}
    for number, (name, call) in turns([*calls.items()], rounds, warm_up=WARM_UP):
        seconds = once(call, device)
        timing.seconds[name] += [seconds] if number > 0 else []


def once(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call; on a GPU, by its own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def table(timings: list[Timing], title: str) -> Table:
    """Build the table for the screen."""
    made = Table(title=title)
    versions = [name for name in ("fast", "reference", "plain") if any(name in one.seconds for one in timings)]
    for column in ("kernel", "case"):
        made.add_column(column, overflow="fold")
    for column in ("MiB", "copy\nGB/s", *(f"{name}\n{unit}" for name in versions for unit in ("GB/s", "of copy"))):
        made.add_column(column, justify="right")
    for one in timings:
        numbers = [_speed(one, "copy")]
        for name in versions:
            share = one.share(name)
            numbers += [_speed(one, name), "" if share is None else f"{share:.1%}"]
        made.add_row(one.kernel, one.case, f"{one.moved / 2**20:.0f}", *numbers)
    return made


def _speed(timing: Timing, version: str) -> str:
    median = timing.median(version)
    return "" if not median else f"{timing.moved / median / 1e9:.2f}"


def describe_device(device: torch.device) -> dict[str, Any]:
    """Tell what computed: the machine, the processor's name, and the versions of what ran."""
    found: dict[str, Any] = dict(describe_machine())
    found["processor"] = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found["torch"] = torch.__version__
    has_triton = importlib.util.find_spec("triton") is not None
    found["triton"] = importlib.metadata.version("triton") if has_triton else None
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--size", type=click.IntRange(1), help="MiB that a kernel moves. [1024 on a GPU, 64 on a CPU]")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Counted runs of each.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="torch's threads on a CPU.")
@click.option("--kernel", "names", multiple=True, help="Kernels, by name. [all]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="[results/kernels-cpu.json or -gpu.json]")
def main(
    device: str, size: int | None, rounds: int, threads: int, names: tuple[str, ...], json_path: Path | None
) -> None:
    """Time every kernel against a copy of the same bytes and against the plain torch expression."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU here: choose --device cpu")
    torch.set_num_threads(threads)
    mib = size or DEFAULT_MIB[device]
    chosen = choose(names)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    timings, left_out = run(chosen, mib << 20, rounds, torch.device(device), console)
    console.print(table(timings, f"{mib} MiB moved, {rounds} rounds, {device}"))
    if left_out:
        console.print(f"without a large case, and so not timed: {', '.join(left_out)}")
    document = {
        "machine": describe_device(torch.device(device)),
        "threads": threads if device == "cpu" else None,
        "mib": mib,
        "rounds": rounds,
        "kernels": [timing.to_json() for timing in timings],
    }
    save(document, json_path or RESULTS / f"kernels-{'gpu' if device == 'cuda' else 'cpu'}.json")


def choose(names: tuple[str, ...]) -> list[Kernel]:
    """Return the kernels that were asked for."""
    known = {kernel.name: kernel for kernel in kernels()}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--kernel")
    return [known[name] for name in names or known]


def run(
    chosen: list[Kernel], moved: int, rounds: int, device: torch.device, console: Console
) -> tuple[list[Timing], list[str]]:
    """Time the kernels one after the other; return the timings, and the names of those that have no large case."""
    timings, left_out = [], []
    with Progress(console=console, transient=True) as progress:
        for kernel in progress.track(chosen, description="kernels"):
            found = contenders(kernel, moved, device)
            if found is None:
                left_out.append(kernel.name)
                continue
            measure(*found, rounds, device)
            timings.append(found[0])
            del found
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return timings, left_out


if __name__ == "__main__":
    main()
