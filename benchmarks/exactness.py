"""Whether a merge is exact: compared with float64 arithmetic on the inputs, rounded once.

A float16 element may differ from that by one unit in the last place, and only where the float64 value lies so
close to the middle between two neighbours that the last bit of a decimal weight decides: within 1e-6 of
the largest input to that element.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.jobs import Job

TOLERANCE = 1e-6
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Exactness:
    """What a comparison found, in numbers of elements.

    Args:
        elements: compared.
        differing: other than float64 arithmetic rounded once.
        wrong: those that differ by more than one unit in the last place, or not at a middle.
        tensors: compared.
        missing: tensors of A that the output does not have, or has in another shape or type.
    """

    elements: int
    differing: int
    wrong: int
    tensors: int
    missing: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong or missing."""
        return self.wrong == 0 and self.missing == 0


def reference(job: Job, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Merge in float64; a difference is taken first, as the formula has it."""
    wide = [values.astype(np.float64) for values in inputs]
    if job.alpha is not None and job.operation == "add-diff":
        return wide[0] + job.alpha * (wide[1] - wide[2])
    total = job.coefficients[0] * wide[0]
    for weight, values in zip(job.coefficients[1:], wide[1:], strict=True):
        total += weight * values
    return total


def compare(job: Job, inputs: Sequence[NDArray[Any]], merged: NDArray[Any]) -> tuple[int, int]:
    """Return how many elements differ from exact arithmetic, and how many of those are wrong.

    Args:
        job: what was to be done.
        inputs: the tensor in each model, float16, all of one shape.
        merged: the tensor in the output, float16.
    """
    exact = reference(job, inputs)
    rounded = exact.astype(np.float16)
    places = np.nonzero(~(rounded == merged))  # also where it is not a number
    if not len(places[0]):
        return 0, 0
    exact, rounded, merged = exact[places], rounded[places], merged[places]
    largest = np.max([np.abs(values[places].astype(np.float64)) for values in inputs], axis=0)
    middle = (rounded.astype(np.float64) + merged.astype(np.float64)) / 2
    fair = (np.nextafter(merged, rounded) == rounded) & (np.abs(exact - middle) <= TOLERANCE * largest)
    return len(exact), int(np.count_nonzero(~fair))


def check(job: Job, inputs: Sequence[Path], outputs: Sequence[Path], *, sample: int = 48, seed: int = 0) -> Exactness:
    """Compare a merged model with its inputs on a sample of tensors.

    Args:
        job: what was to be done.
        inputs: the models, in the job's order; safetensors files.
        outputs: the merged model, one safetensors file or several shards.
        sample: how many tensors are compared element by element: the largest and smallest and some drawn at
            random. Names, shapes and types are compared for all.
        seed: which are drawn.
    """
    with ExitStack() as files:
        sources = [files.enter_context(_open(path)) for path in inputs[: job.models]]
        shards = [files.enter_context(_open(path)) for path in outputs]
        merged: dict[str, Any] = {}
        for shard in shards:
            merged |= dict.fromkeys(shard.keys(), shard)
        names = sorted(sources[0].keys())
        missing = sum(not _fits(name, sources[0], merged) for name in names)
        chosen = _choose(names, sources[0], sample, seed)
        compared = [name for name in chosen if _fits(name, sources[0], merged)]
        counts = [_compare_tensor(job, name, sources, merged[name]) for name in compared]
    elements, differing, wrong = (sum(column) for column in zip((0, 0, 0), *counts, strict=True))
    return Exactness(elements, differing, wrong, len(compared), missing)


def _open(path: Path) -> Any:
    """Read with another reader than the one that is tested."""
    return safe_open(path, framework="np")


def _fits(name: str, source: Any, merged: dict[str, Any]) -> bool:
    if name not in merged:
        return False
    ours, theirs = source.get_slice(name), merged[name].get_slice(name)
    return bool(ours.get_shape() == theirs.get_shape() and ours.get_dtype() == theirs.get_dtype())


def _choose(names: list[str], source: Any, sample: int, seed: int) -> list[str]:
    """Choose the extremes, everything that is not float16, and a random rest."""
    sizes = {name: int(np.prod(source.get_slice(name).get_shape())) for name in names}
    ordered = sorted(names, key=sizes.__getitem__)
    odd = {name for name in names if source.get_slice(name).get_dtype() != "F16"}
    chosen = odd | {ordered[0], ordered[-1]}
    rest = [name for name in names if name not in chosen]
    drawn = np.random.default_rng(seed).permutation(len(rest))[: max(0, sample - len(chosen))]
    return sorted(chosen | {rest[index] for index in drawn})


def _compare_tensor(job: Job, name: str, sources: Sequence[Any], output: Any) -> tuple[int, int, int]:
    """Elements, differing, wrong. What is not float16, and CLIP's logit_scale, must be A's."""
    inputs = [np.asarray(source.get_tensor(name)).reshape(-1) for source in sources]
    merged = np.asarray(output.get_tensor(name)).reshape(-1)
    if merged.dtype != np.float16 or name.endswith("logit_scale"):
        differing = int(np.count_nonzero(merged != inputs[0]))
        return len(merged), differing, differing
    differing = wrong = 0
    for start in range(0, len(merged), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = compare(job, [values[part] for values in inputs], merged[part])
        differing, wrong = differing + found[0], wrong + found[1]
    return len(merged), differing, wrong
