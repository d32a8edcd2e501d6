"""What is measured: the jobs, and one measured run of a job in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement

ROOT = Path(__file__).resolve().parents[1]


class RunError(Exception):
    """A measured process ended badly. The message is the last line that it wrote."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge, the same for every tool.

    Args:
        name: how the table calls it.
        operation: ``weighted``, ``add-diff``, ``ties``, ``convert`` of an adapter, ``bake``, or ``extract``.
        coefficients: what each model is multiplied with.
        alpha: the factor that the user gives, where it is not a list of weights.
        layout: what an adapter is converted to.
        rank: what is extracted at.
    """

    name: str
    operation: str
    coefficients: tuple[float, ...]
    alpha: float | None = None
    layout: str | None = None
    rank: int | None = None

    @property
    def models(self) -> int:
        """How many models it merges."""
        return len(self.coefficients)

    @classmethod
    def add_difference(cls, alpha: float) -> Job:
        """Merge A + alpha (B - C)."""
        return cls(f"add-diff, alpha {alpha:g}", "add-diff", (1.0, alpha, -alpha), alpha)

    @classmethod
    def weighted_pair(cls, alpha: float) -> Job:
        """Merge (1 - alpha) A + alpha B."""
        return cls(f"weighted, alpha {alpha:g}", "weighted", (1 - alpha, alpha), alpha)

    @classmethod
    def weighted(cls, *weights: float) -> Job:
        """Merge the models times their weights."""
        return cls(f"weighted, {'/'.join(f'{weight:g}' for weight in weights)}", "weighted", weights)

    @classmethod
    def ties(cls) -> Job:
        """Merge B and C into A by TIES: of what each changed, the largest fifth."""
        return cls("ties, density 0.2", "ties", (1.0, 1.0, 1.0))

    @classmethod
    def convert(cls, layout: str) -> Job:
        """Convert an adapter to another layout."""
        return cls(f"to {layout}", "convert", (1.0,), layout=layout)

    @classmethod
    def bake(cls, adapters: int) -> Job:
        """Bake adapters into a model."""
        return cls(f"bake {adapters}", "bake", (1.0,) * (adapters + 1))

    @classmethod
    def extract(cls, rank: int) -> Job:
        """Extract a LoRA of B over C."""
        return cls(f"extract, rank {rank}", "extract", (1.0, -1.0), rank=rank)


ADD_FULL = Job.add_difference(1.0)
WEIGHTED_THREE = Job.weighted(0.5, 0.3, 0.2)
JOBS = (WEIGHTED_THREE, Job.weighted_pair(0.3), ADD_FULL, Job.add_difference(0.7))
PEER_JOBS = (WEIGHTED_THREE, ADD_FULL)


@dataclass(frozen=True, slots=True)
class Run:
    """A job in the hands of one tool.

    Args:
        tool: ``floor``, ``sdmerge`` or a peer.
        job: what to do. The floor only counts its models.
        overlap: for the floor, whether data is forced to the disk while more is written.
    """

    tool: str
    job: Job
    overlap: bool = False

    @property
    def label(self) -> str:
        """How the table calls it."""
        if self.tool != "floor":
            return self.job.name
        return f"read {self.job.models}, write 1{', flushing meanwhile' if self.overlap else ''}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one measured run said."""

    measurement: Measurement
    version: str


def execute(run: Run, inputs: tuple[Path, ...], output: Path, *, threads: int, python: str = sys.executable) -> Outcome:
    """Make one run in a process of its own and return what it measured.

    Args:
        run: what to run.
        inputs: the family's files.
        output: where the output goes, in a folder that exists.
        threads: for the floor and sdmerge; peers choose their own number.
        python: the interpreter that has the tool.

    Raises:
        RunError: the process ended badly or said nothing.
    """
    request = asdict(run) | {
        "inputs": [str(path) for path in inputs[: run.job.models]],
        "output": str(output),
        "threads": threads,
    }
    process = subprocess.run(
        [python, "-m", "benchmarks.child"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environment(python),
        check=False,
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"ended with code {process.returncode}"]
        raise RunError(f"{run.tool}, {run.label}: {lines[-1]}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return Outcome(Measurement(**answer["measurement"]), answer["version"])


def _environment(python: str) -> dict[str, str]:
    roots = [ROOT] if python != sys.executable else [ROOT, ROOT / "formats", ROOT / "kernels"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONDONTWRITEBYTECODE": "1"}
