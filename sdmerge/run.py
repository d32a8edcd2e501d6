"""Run a plan: the tensor core that every command uses.

Elementwise steps travel in blocks: a worker reads a block of each input into its own reused buffers, computes in float32
while it sits in the cache, rounds once and writes it to its place. Workers take blocks in order from one list, so
the inputs are read from front to back; block borders are fixed, so the output is the same with any number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels import cast
from sdmerge.dtypes import TORCH
from sdmerge.errors import NonFiniteInput, OutputOverflow, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdformats.tensor import TensorSink
    from sdmerge.options import Options
    from sdmerge.step import Plan, Read, Step

BLOCK = 1 << 18
"""Elements in a block: a few buffers of this size stay in a core's cache, and the cost of a call is spread thin."""
_WIDEST = 8
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MAX_THREADS = 8


@dataclass
class Findings:
    """What a run met and was told to accept, by tensor name: counts of elements."""

    nonfinite: Counter[str] = field(default_factory=Counter)
    overflowed: Counter[str] = field(default_factory=Counter)


def run(plan: Plan, sink: TensorSink, options: Options, progress: Callable[[int], None]) -> Findings:
    """Read, compute and write every step of `plan`. The caller commits the sink.

    Args:
        plan: what to do.
        sink: laid out for `plan.specs`.
        options: device, threads, and what to accept.
        progress: called from this thread with the number of bytes read and written since the last call.

    Raises:
        NonFiniteInput, OutputOverflow: as `options` say.
        FormatError: an input cannot be read, or the output not written.
    """
    keep_freed_memory()
    job = _Job(plan, sink, options)
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over blocks: one thread each, the same bytes for any number of them
    count = options.threads or min(_MAX_THREADS, available_cores())
    workers = [threading.Thread(target=job.work, name=f"sdmerge-{i}", daemon=True) for i in range(count)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.join(0.05)
            progress(job.take_progress())
    finally:
        job.stop.set()
        for worker in workers:
            worker.join()
        torch.set_num_threads(intra_op)
    progress(job.take_progress())
    if job.error is not None:
        raise job.error
    return job.findings


@cache
def keep_freed_memory() -> None:
    """Let freed memory be used again at once.

    By default glibc gives a freed block of this size back to the system, which hands it out again page by page, cleared:
    that costs more than the arithmetic. 64 MiB a thread may stay with the process instead. Elsewhere nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(options: Options) -> torch.device:
    """Return the device to compute on. Streaming merges are bound by reading and writing: ``auto`` is the CPU for them.

    Raises:
        RequestError: the device does not exist here.
    """
    if options.device == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise RequestError(f"device is {options.device!r} (expected auto, cpu, cuda or cuda:N)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device {options.device} is not here; {torch.cuda.device_count()} CUDA devices are")
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {options.device!r} (expected auto, cpu, cuda or cuda:N)")
    return device


class _Job:
    """What the workers share."""

    def __init__(self, plan: Plan, sink: TensorSink, options: Options) -> None:
        self.sink = sink
        self.options = options
        self.device = pick_device(options)
        self.findings = Findings()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.whole = threading.Lock()  # one whole tensor at a time bounds the memory
        self._lock = threading.Lock()
        self._blocks = _blocks(plan)
        self._done = 0

    def work(self) -> None:
        """Take blocks until there are none, or until someone fails."""
        try:
            with torch.inference_mode():
                worker = _Worker(self)
                while not self.stop.is_set():
                    with self._lock:
                        block = next(self._blocks, None)
                    if block is None:
                        return
                    worker.do(*block)
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count

    def take_progress(self) -> int:
        with self._lock:
            done, self._done = self._done, 0
        return done

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


def _blocks(plan: Plan) -> Iterator[tuple[Step, int, int]]:
    for step in plan.steps:
        count = step.spec.numel
        if step.whole:
            yield step, 0, count
            continue
        for start in range(0, count, BLOCK):
            yield step, start, min(BLOCK, count - start)


class _Buffer:
    """Memory for the raw bytes of one block, as a tensor and as something to read into."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._view = as_bytes(self._tensor)

    def bytes(self, nbytes: int) -> memoryview:
        return self._view[:nbytes]

    def tensor(self, nbytes: int, dtype: torch.dtype) -> Tensor:
        return self._tensor[:nbytes].view(dtype)


class _Worker:
    """A thread's own buffers, and what it does with a block."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.pinned = job.device.type == "cuda"
        self.stream = torch.cuda.Stream(job.device) if self.pinned else None  # type: ignore[no-untyped-call]
        self.inputs: list[_Buffer] = []
        self.output = _Buffer(BLOCK * _WIDEST, pinned=self.pinned)

    def do(self, step: Step, start: int, count: int) -> None:
        """Read, compute and write one block, or one whole tensor."""
        if step.whole:
            with self.job.whole:
                self._whole(step)
        elif step.compute is None and step.reads[0].spec.dtype == step.spec.dtype:
            self._copy(step, start, count)
        else:
            with torch.cuda.stream(self.stream):
                self._blockwise(step, start, count)
        read = sum(r.spec.nbytes if step.whole else count * r.spec.dtype.bits // 8 for r in step.reads)
        self.job.advance(read + count * step.spec.dtype.bits // 8)

    def _copy(self, step: Step, start: int, count: int) -> None:
        read = step.reads[0]
        bits = read.spec.dtype.bits
        offset, nbytes = start * bits // 8, count * bits // 8  # BLOCK is a multiple of 8, so blocks end on bytes
        data = self._input(0).bytes(nbytes)
        read.source.read_into(read.key, offset, data)
        dtype = TORCH.get(read.spec.dtype)
        if dtype is not None and read.spec.dtype.is_float:
            values = self._input(0).tensor(nbytes, dtype).to(torch.float32)
            if not _bounded(values, torch.float32):
                self.job.count_nonfinite(read, values)
        self.job.sink.write(step.name, offset, data)

    def _blockwise(self, step: Step, start: int, count: int) -> None:
        values = self._read_block(step, start, count)
        result = step.compute(*values) if step.compute is not None else values[0]
        dtype = TORCH[step.spec.dtype]
        nbytes = count * dtype.itemsize
        out = self.output.tensor(nbytes, dtype)
        self._check(step, values, result, dtype)
        saturate = self.job.options.overflow == "saturate"
        if self.stream is None:
            cast.narrow(result, out, saturate=saturate)
        else:
            rounded = torch.empty(count, dtype=dtype, device=result.device)
            out.copy_(cast.narrow(result, rounded, saturate=saturate), non_blocking=True)
            self.stream.synchronize()
        self.job.sink.write(step.name, start * dtype.itemsize, self.output.bytes(nbytes))

    def _read_block(self, step: Step, start: int, count: int) -> list[Tensor]:
        """Return one block of each input: as stored for a mixed step, else in the type to compute in."""
        wide = cast.accumulator(*(TORCH[read.spec.dtype] for read in step.reads))
        values = []
        for index, read in enumerate(step.reads):
            dtype = TORCH[read.spec.dtype]
            nbytes = count * dtype.itemsize
            buffer = self._input(index)
            read.source.read_into(read.key, start * dtype.itemsize, buffer.bytes(nbytes))
            value = buffer.tensor(nbytes, dtype)
            if self.stream is not None:
                value = value.to(self.job.device, non_blocking=True)
            values.append(value if step.mixed else value.to(wide))
        return values

    def _whole(self, step: Step) -> None:
        """Whole tensors, scaled where they are fp8 with a factor. Memory is what the tensors take."""
        values = [whole(read).to(self.job.device) for read in step.reads]
        assert step.compute is not None, "only a computation needs whole tensors"
        result = step.compute(*values)
        dtype = TORCH[step.spec.dtype]
        out = torch.empty(step.spec.shape, dtype=dtype)
        if step.spec.dtype.is_float:
            self._check(step, values, result, dtype)
            cast.narrow(result.cpu(), out, saturate=self.job.options.overflow == "saturate")
        else:
            out.copy_(result)
        if step.spec.nbytes:
            self.job.sink.write(step.name, 0, as_bytes(out))

    def _check(self, step: Step, values: list[Tensor], result: Tensor, dtype: torch.dtype) -> None:
        """Look for NaN, infinity and overflow: one cheap reduction where all is well."""
        suspicious = not _bounded(result, dtype)
        bad = 0
        if suspicious or not step.propagates:
            for read, value in zip(step.reads, values, strict=True):
                if suspicious or not _bounded(value, torch.float32):
                    bad += self.job.count_nonfinite(read, value)
        if suspicious:
            self.job.count_overflow(step, result, dtype, finite=not bad)

    def _input(self, index: int) -> _Buffer:
        while len(self.inputs) <= index:
            self.inputs.append(_Buffer(BLOCK * _WIDEST, pinned=self.pinned))
        return self.inputs[index]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable, as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def whole(read: Read) -> Tensor:
    """Return one tensor, widened to float32 (float64 stays), times its factor where it has one."""
    dtype = TORCH[read.spec.dtype]
    values = (
        torch.frombuffer(read.source.read(read.key), dtype=dtype) if read.spec.nbytes else torch.empty(0, dtype=dtype)
    )
    values = values.reshape(read.spec.shape).to(cast.accumulator(dtype))
    if read.scale is None:
        return values
    factor = torch.frombuffer(read.source.read(read.scale), dtype=TORCH[read.source.specs[read.scale].dtype]).float()
    return values * (factor if factor.numel() == 1 else factor.reshape(-1, *[1] * (values.dim() - 1)))


def _bounded(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether no element can be NaN, infinite or too large for `dtype`. May say no where all is well, never yes wrongly.

    If the sum of squares is below the limit's square, so is every square; NaN and infinity make the comparison false.
    A sum is cheaper than a look at each element. The half leaves room for the sum's own rounding.
    """
    flat = values.reshape(-1)
    return bool(torch.dot(flat, flat).item() < 0.5 * min(cast.limit(dtype), 1e18) ** 2)
