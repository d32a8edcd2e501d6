"""The results of a benchmark: what is written as JSON, and the table on the screen."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table

from benchmarks.jobs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.exactness import Exactness
    from benchmarks.jobs import Outcome

T = TypeVar("T")


@dataclass(slots=True)
class Result:
    """All counted runs of one job by one tool, or why there are none."""

    run: Run
    outcomes: list[Outcome] = field(default_factory=list)
    exactness: Exactness | None = None
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Wall time of each counted run."""
        return [outcome.measurement.seconds for outcome in self.outcomes]

    @property
    def median(self) -> float | None:
        """Median wall time in seconds."""
        return statistics.median(self.seconds) if self.outcomes else None

    @property
    def best(self) -> float | None:
        """Shortest wall time in seconds: what disturbs a run only ever adds to it."""
        return min(self.seconds, default=None)

    @property
    def anonymous(self) -> int | None:
        """Largest peak of anonymous memory over idle, in bytes."""
        return _largest(outcome.measurement.anonymous for outcome in self.outcomes)

    @property
    def resident(self) -> int | None:
        """Largest peak of resident memory over idle, in bytes."""
        return _largest(outcome.measurement.resident for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of one family of files, and what they are measured against."""

    family: str
    title: str
    input_bytes: int
    page_cache: str
    results: Sequence[Result]

    def floor(self, run: Run) -> float | None:
        """Return the better floor with as many inputs as `run` has: the smallest median, in seconds."""
        return min((floor.median for floor in self._floors(run) if floor.median is not None), default=None)

    def best_floor(self, run: Run) -> float | None:
        """Return the shortest run of any floor with as many inputs as `run` has, in seconds."""
        return min((floor.best for floor in self._floors(run) if floor.best is not None), default=None)

    def _floors(self, run: Run) -> list[Result]:
        floors = [result for result in self.results if result.run.tool == "floor"]
        return [floor for floor in floors if floor.run.job.models == run.job.models]

    def product(self, run: Run) -> float | None:
        """Return the median of sdmerge for the same job, in seconds."""
        wanted = Run("sdmerge", run.job)
        return next((result.median for result in self.results if result.run == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "family": self.family,
            "input_bytes": self.input_bytes,
            "page_cache": self.page_cache,
            "results": [self._row(result) for result in self.results],
        }

    def _row(self, result: Result) -> dict[str, Any]:
        exactness = result.exactness
        return {
            "tool": result.run.tool,
            "version": result.outcomes[0].version if result.outcomes else "",
            "job": result.run.label,
            "seconds": [round(seconds, 3) for seconds in result.seconds],
            "median_seconds": result.median,
            "best_seconds": result.best,
            "times_floor": ratio(result.median, self.floor(result.run)),
            "best_times_floor": ratio(result.best, self.best_floor(result.run)),
            "times_sdmerge": ratio(result.median, self.product(result.run)),
            "peak_anonymous_bytes": result.anonymous,
            "peak_resident_bytes": result.resident,
            "exactness": None
            if exactness is None
            else {name: getattr(exactness, name) for name in exactness.__dataclass_fields__},
            "failure": result.failure,
        }

    def table(self) -> Table:
        """Build the table for the screen."""
        size = f"{self.input_bytes / 1e9:.1f} GB a file"
        table = Table(title=f"{self.title}: {size}, page cache {self.page_cache}")
        for column in ("tool", "job"):
            table.add_column(column, overflow="fold")
        for column in (
            "seconds (range)",
            "x floor",
            "best\nx floor",
            "x sdmerge",
            "anonymous\nMB",
            "resident\nMB",
            "inexact",
        ):
            table.add_column(column, justify="right")
        for result in self.results:
            if result.median is None:
                table.add_row(result.run.tool, result.run.label, "failed", style="red")
                continue
            row = self._row(result)
            spread = f"{result.median:.2f} ({min(result.seconds):.2f}-{max(result.seconds):.2f})"
            ratios = [_times(row[name]) for name in ("times_floor", "best_times_floor", "times_sdmerge")]
            memory = (_megabytes(result.anonymous), _megabytes(result.resident))
            numbers = (spread, *ratios, *memory, _inexact(result.exactness))
            table.add_row(result.run.tool, result.run.label, *numbers)
        return table


def turns(runs: Sequence[T], rounds: int, *, warm_up: int = 1) -> Iterator[tuple[int, T]]:
    """Yield what is measured by turns, so that a disturbance meets each, with the number of the round.

    Args:
        runs: what is measured once in each round, in this order.
        rounds: those that count: 1, 2, ...
        warm_up: rounds before them, which fill caches, compile and allocate: ..., -1, 0.
    """
    for number in range(1 - warm_up, rounds + 1):
        for run in runs:
            yield number, run


def ratio(value: float | None, reference: float | None) -> float | None:
    """`value` over `reference` where there are both, to three decimals."""
    return None if value is None or not reference else round(value / reference, 3)


def _largest(values: Any) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e6:.0f}"


def _inexact(found: Exactness | None) -> str:
    if found is None:
        return ""
    text = f"{found.differing / max(1, found.elements):.3%}"
    if found.wrong:
        text += f", wrong {found.wrong / max(1, found.elements):.3%}"
    return text + (f", {found.missing} missing" if found.missing else "")


def against_floors(floors: Sequence[Result], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row for each result, floors first: medians, and how many times the better floor they are."""
    floor = min(statistics.median(result.seconds) for result in floors)
    return [
        {
            "tool": result.run.tool,
            "job": result.run.label,
            "seconds": statistics.median(result.seconds),
            "all": [round(seconds, 3) for seconds in result.seconds],
            "x floor": statistics.median(result.seconds) / floor,
            "resident MB over idle": round((result.resident or 0) / 1e6),
            "anonymous MB over idle": round((result.anonymous or 0) / 1e6),
        }
        for result in (*floors, *results)
    ]


def save(found: Mapping[str, Any], path: Path | None) -> None:
    """Write what was found as JSON, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows as a table for the screen."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
