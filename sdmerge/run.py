"""Run a plan: the tensor core that every command uses.

Elementwise steps travel in blocks: a worker reads a block of each input into its own reused buffers, computes in float32
while it sits in the cache, rounds once and writes it to its place. Workers take blocks in order from one list, so
the inputs are read from front to back; block borders are fixed, so the output is the same with any number of threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels import cast
from sdmerge import worker
from sdmerge.errors import NonFiniteInput, OutputOverflow, RequestError
from sdmerge.team import in_threads
from sdmerge.whole import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdformats.tensor import TensorSink
    from sdmerge.options import Options
    from sdmerge.step import Plan, Read, Step

    Output = tuple[Plan, TensorSink]

_LEAST_ROOM = 256 << 20
"""Bytes that whole tensors may take together where the largest one takes less."""


@dataclass
class Findings:
    """What a run met and was told to accept, by tensor name: counts of elements."""

    nonfinite: Counter[str] = field(default_factory=Counter)
    overflowed: Counter[str] = field(default_factory=Counter)


def run(outputs: Sequence[Output], options: Options, progress: Callable[[int], None]) -> Findings:
    """Read, compute and write every step of one plan, or of several over the same inputs. The caller commits the sinks.

    Args:
        outputs: plans, each with a sink laid out for its specs. What they read alike is read once.
        options: device, threads, and what to accept.
        progress: called from this thread with the number of bytes read and written since the last call.

    Raises:
        NonFiniteInput, OutputOverflow: as `options` say.
        FormatError: an input cannot be read, or the output not written.
    """
    job = Job(outputs, options)
    if job.device.type == "cuda":
        from sdmerge import gpu

        in_threads(
            gpu.batches(job.groups),
            lambda: gpu.working(job),
            threads=options.threads,
            name="sdmerge",
            progress=progress,
        )
        return job.findings
    blocks = _blocks(job.groups)
    in_threads(
        blocks,
        lambda: contextlib.nullcontext(worker.Worker(job).do),
        threads=options.threads,
        name="sdmerge",
        progress=progress,
    )
    return job.findings


def pick_device(options: Options, plans: Sequence[Plan] = (), *, heavy: bool = False) -> torch.device:
    """Return the device to compute on.

    ``auto`` is a rule: merges in blocks are bound by reading and writing, and a trip over the bus would only lengthen
    them, so they stay on the CPU; where more than half of the bytes need whole tensors (spectra, sorted magnitudes,
    decompositions: arithmetic, not reading) a GPU is taken if there is one. `heavy`: so it is, without plans.

    Raises:
        RequestError: the device does not exist here.
    """
    if options.device == "auto":
        whole = sum(step.cost for plan in plans for step in plan.steps if step.whole)
        pays = heavy or 2 * whole > sum(plan.cost for plan in plans)
        return torch.device("cuda" if pays and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise RequestError(f"device is {options.device!r} (expected auto, cpu, cuda or cuda:N)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device {options.device} is not here; {torch.cuda.device_count()} CUDA devices are")
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {options.device!r} (expected auto, cpu, cuda or cuda:N)")
    return device


class Job:
    """What the workers share."""

    def __init__(self, outputs: Sequence[Output], options: Options) -> None:
        self.options = options
        self.device = pick_device(options, [plan for plan, _ in outputs])
        self.findings = Findings()
        self.groups = _groups(outputs)
        largest = max((group[0].step.memory for group in self.groups if group[0].step.whole), default=0)
        self.room = _Room(max(largest, _LEAST_ROOM))
        self.pool = Pool()
        self._lock = threading.Lock()

    def count_nonfinite(self, read: Read, values: Tensor) -> int:
        """Refuse or count NaN and infinity in an input; return how many there are."""
        bad = int((~values.to(cast.accumulator(values.dtype)).isfinite()).sum().item())  # fp8 cannot tell by itself
        if not bad:
            return 0
        if not self.options.allow_nonfinite:
            raise NonFiniteInput(
                f"{read}: holds NaN or infinity ({bad:,} elements in the block that was looked at); "
                "repair the model, or go on with --allow-nonfinite"
            )
        with self._lock:
            self.findings.nonfinite[str(read)] += bad
        return bad

    def count_overflow(self, step: Step, result: Tensor, dtype: torch.dtype, *, finite: bool) -> None:
        """Refuse or count results that the output type cannot hold; from `finite` inputs, infinity is one of them."""
        bad = cast.overflow(result, dtype)
        if finite:
            bad += int((~result.isfinite()).sum().item())
        if not bad:
            return
        if self.options.overflow == "refuse":
            raise OutputOverflow(
                f"{step.name!r}: {bad:,} results are too large for {step.spec.dtype} (largest {torch.finfo(dtype).max:g}); "
                "choose a wider --dtype, or --overflow saturate|inf"
            )
        with self._lock:
            self.findings.overflowed[step.name] += bad


class _Room:
    """Bounds the memory of whole tensors: as many at a time as take no more than the largest one. First come, first served."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(
                lambda: self._waiting[0] is ticket and (not self._used or self._used + size <= self._limit)
            )
            self._waiting.popleft()
            self._used += size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _groups(outputs: Sequence[Output]) -> list[worker.Group]:
    """Put steps together that read the same: one for each output, in the order of the first plan."""
    found: dict[tuple[str, tuple[Read, ...], bool, bool], list[worker.Target]] = {}
    for plan, sink in outputs:
        for step in plan.steps:
            key = (step.name, step.reads, step.whole, step.compute is None)
            found.setdefault(key, []).append(worker.Target(step, sink))
    return [tuple(group) for group in found.values()]


def _blocks(groups: Sequence[worker.Group]) -> Iterator[tuple[worker.Group, int, int]]:
    for group in groups:
        step = group[0].step
        count = step.spec.numel
        if step.whole:
            yield group, 0, count
            continue
        for start in range(0, count, worker.RUN):
            yield group, start, min(worker.RUN, count - start)
