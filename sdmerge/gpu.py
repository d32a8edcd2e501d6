"""What one thread of a run does on a GPU: reading, copying in, computing, copying out and writing, all at the same time.

The unit of work is a batch: blocks and whole tensors of some megabytes together. Its bytes are read into pinned memory piece by
piece, and each piece is on its way to the GPU while the next one is read. When all are handed over, the computation is, and the
way back; then the thread reads the next batch. What came back is written when its pinned memory is needed again, and results are
judged one batch later. So nothing waits but for memory, of which there is a fixed amount.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from sdkernels import cast, philox, rounding
from sdmerge import lanes as lanes_of
from sdmerge import worker
from sdmerge.dtypes import TORCH
from sdmerge.lora.bake import Baked
from sdmerge.lora.grouped import Baking, bake, parts_of
from sdmerge.whole import as_bytes, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sdmerge.lanes import Lanes, Mark
    from sdmerge.run import Job
    from sdmerge.step import Read, Step
    from sdmerge.worker import Group, Target

BLOCK = 1 << 22
"""Elements of a block: enough to fill a GPU."""
BATCH = 32 << 20
"""Bytes that a batch reads, roughly; a tensor that is larger, and needed whole, is a batch of its own."""
_PIECE = 8 << 20
_PIECES = 3
_SMALLEST = 1 << 10


class Piece(NamedTuple):
    """Steps that are made from the same reads, and which of their elements."""

    group: Group
    start: int
    size: int


def batches(groups: Sequence[Group]) -> Iterator[tuple[tuple[Piece, ...]]]:
    """Yield the work in batches; what no GPU is needed for is in batches of one piece, of the CPU's size."""
    held: list[Piece] = []
    size = 0
    for group in groups:
        step = group[0].step
        block = step.spec.numel if step.whole else (BLOCK if _computed_on(step) else worker.RUN)
        for start in range(0, max(1, step.spec.numel) if step.whole else step.spec.numel, max(1, block)):
            piece = Piece(group, start, min(block, step.spec.numel - start))
            if not _computed_on(step):
                yield ((piece,),)
                continue
            cost = sum(_nbytes(read, piece) for read in step.reads)
            if held and size + cost > BATCH:
                yield (tuple(held),)
                held, size = [], 0
            held.append(piece)
            size += cost
    if held:
        yield (tuple(held),)


def _computed_on(step: Step) -> bool:
    """Whether a GPU has a part in a step: copies, constants and whole numbers are the CPU's."""
    return step.compute is not None and bool(step.reads) and step.spec.dtype.is_float and step.spec.dtype in TORCH


def _nbytes(read: Read, piece: Piece) -> int:
    return read.spec.nbytes if piece.group[0].step.whole else piece.size * read.spec.dtype.bits // 8


@dataclass
class _Slot:
    """A piece of pinned memory, and what must happen before it is used again."""

    memory: Tensor
    settle: Callable[[], None] | None = None

    def free(self) -> Tensor:
        if self.settle is not None:
            self.settle()
        self.settle = None
        return self.memory


class _Ring:
    """Pinned memory that is used round and round."""

    def __init__(self, lanes: Lanes) -> None:
        self._slots = [_Slot(lanes.staging(_PIECE)) for _ in range(_PIECES)]
        self._next = 0

    def take(self) -> _Slot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.free()
        return slot

    def drain(self) -> None:
        for _ in self._slots:
            self.take()


@dataclass
class _Result:
    """One output of a batch, on the device.

    Attributes:
        values: what it was computed from.
        wide: before rounding; what a launch baked and rounded in one has nothing wider.
        out: rounded.
    """

    target: Target
    piece: Piece
    values: list[Tensor]
    wide: Tensor | None = None
    out: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return TORCH[self.target.step.spec.dtype]


@dataclass
class _Batch:
    """What is under way.

    Attributes:
        lengths: of every result, and of the inputs of those that may hide what is not finite; float64, on the device.
        limits: what each must be below to be above suspicion.
        done: when all of it is computed, and copied out.
    """

    results: list[_Result]
    lengths: Tensor | None = None
    limits: list[float] = field(default_factory=list)
    done: Mark | None = None


@contextlib.contextmanager
def working(job: Job, lanes: Lanes | None = None) -> Iterator[Callable[[Sequence[Piece]], int]]:
    """Give a function that does a batch; what is still under way is finished at the end."""
    mine = Worker(job, lanes or lanes_of.cuda(job.device))
    yield mine.do
    mine.finish()


class Worker:
    """A thread's share of the GPU."""

    def __init__(self, job: Job, lanes: Lanes) -> None:
        self._job, self._lanes = job, lanes
        self._in, self._out = _Ring(lanes), _Ring(lanes)
        self._unjudged: deque[_Batch] = deque()
        self._host = worker.Worker(job)
        self._saturate = job.options.overflow == "saturate"
        self._rounding = job.options.stochastic_rounding

    def do(self, batch: Sequence[Piece]) -> int:
        """Start a batch, and judge the one before; return the bytes that it moves."""
        if not _computed_on(batch[0].group[0].step):
            return self._host.do(*batch[0])
        if not self._started(batch):
            self._in_parts(batch)
        return sum(_cost(piece) for piece in batch)

    def finish(self) -> None:
        """Write and judge what is still under way."""
        self._out.drain()
        self._in.drain()
        while self._unjudged:
            self._judge()

    def _started(self, batch: Sequence[Piece]) -> bool:
        """Start a batch; False where memory ran out."""
        try:
            self._start(batch)
        except torch.OutOfMemoryError:
            # Here what was started still has its memory; it is set free when no lane uses it any more.
            for lane in (self._lanes.inward, self._lanes.compute, self._lanes.outward):
                lane.mark().wait()
            self.finish()
            return False
        return True

    def _in_parts(self, batch: Sequence[Piece]) -> None:
        """Try halves of what memory did not suffice for; what is as small as can be goes to the CPU."""
        self._lanes.release()
        if len(batch) > 1:
            parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        else:
            (piece,) = batch
            half = piece.size // 2
            if piece.group[0].step.whole or half < _SMALLEST:
                self._host.do(*piece)
                return
            rest = piece._replace(start=piece.start + half, size=piece.size - half)
            parts = [[piece._replace(size=half)], [rest]]
        for part in parts:
            if not self._started(part):
                self._in_parts(part)

    def _start(self, pieces: Sequence[Piece]) -> None:
        batch = _Batch([])
        for piece in pieces:
            values = self._uploaded(piece)
            batch.results += [_Result(target, piece, list(values)) for target in piece.group]
        compute, outward = self._lanes.compute, self._lanes.outward
        compute.after(self._lanes.inward.mark())
        compute.do(lambda: self._compute(batch))
        outward.after(compute.mark())
        for result in batch.results:
            self._download(result)
        batch.done = outward.mark()
        self._unjudged.append(batch)
        while len(self._unjudged) > 1:
            self._judge()

    def _uploaded(self, piece: Piece) -> list[Tensor]:
        """Read one block of each input, or whole tensors and their factors, and return them as they will be on the device."""
        step = piece.group[0].step
        values = []
        for read in step.reads:
            start = 0 if step.whole else piece.start * read.spec.dtype.bits // 8
            value = self._upload(read, read.key, start, _nbytes(read, piece)).view(TORCH[read.spec.dtype])
            values.append(value.view(read.spec.shape) if step.whole else value)
        for read in step.reads:
            if read.scale is not None:
                spec = read.source.specs[read.scale]
                values.append(self._upload(read, read.scale, 0, spec.nbytes).view(TORCH[spec.dtype]))
        return values

    def _upload(self, read: Read, key: str, start: int, nbytes: int) -> Tensor:
        whole = torch.empty(nbytes, dtype=torch.uint8, device=self._lanes.device)
        for at in range(0, nbytes, _PIECE):
            there = whole[at : at + _PIECE]
            slot = self._in.take()
            here = slot.memory[: there.numel()]
            read.source.read_into(key, start + at, as_bytes(here))
            self._lanes.inward.do(partial(_copy, here, there))
            slot.settle = self._lanes.inward.mark().wait
        return whole

    def _download(self, result: _Result) -> None:
        """Bring a result into pinned memory; it is written when that is needed again."""
        step, piece = result.target.step, result.piece
        width = step.spec.dtype.bits // 8
        nbytes = piece.size * width
        for at in range(0, nbytes, _PIECE):
            slot = self._out.take()
            here = slot.memory[: min(_PIECE, nbytes - at)]
            self._lanes.outward.do(partial(_bring, result, at, here))
            offset = piece.start * width + at
            slot.settle = partial(_write, self._lanes.outward.mark(), result.target, offset, here)

    def _compute(self, batch: _Batch) -> None:
        baked: list[Baking] = []
        for one in batch.results:
            step = one.target.step
            one.values = _scaled(step.reads, one.values)
            shape = step.spec.shape if step.whole else (one.piece.size,)
            one.out = torch.empty(shape, dtype=one.dtype, device=self._lanes.device)
            baking = None if self._saturate else self._baking(step, one.values, one.out)
            if baking is not None:
                baked.append(baking)
                one.wide = one.out
            else:
                assert step.compute is not None, "copies are the CPU's"
                one.wide = step.compute(one.values, one.piece.start)
                self._round(step, one.wide, one.out, one.piece.start)
        if baked:
            bake(baked)
        lengths = []
        for one in batch.results:
            assert one.wide is not None, "computed"
            lengths.append(_length(one.wide))
            batch.limits.append(_limit(one.dtype))
            if not one.target.step.propagates:
                lengths += map(_length, one.values)
                batch.limits += [_limit(torch.float32)] * len(one.values)
        batch.lengths = torch.stack(lengths)

    def _baking(self, step: Step, values: list[Tensor], out: Tensor) -> Baking | None:
        """Return a tensor with adapters as the kernels over tables take it; None where they don't."""
        if not isinstance(step.compute, Baked) or not values[step.compute.index].dim():
            return None
        parts = parts_of(step.compute, values)
        return None if parts is None else Baking(values[step.compute.index], out, parts, self._key(step))

    def _key(self, step: Step) -> philox.Key | None:
        return None if self._rounding is None else philox.key(self._rounding, f"{step.name}: rounding")

    def _round(self, step: Step, wide: Tensor, out: Tensor, start: int) -> None:
        key = self._key(step)
        if key is None:
            cast.narrow(wide, out, saturate=self._saturate)
            return
        top = torch.finfo(out.dtype).max
        rounding.stochastic(wide.clamp(-top, top) if self._saturate else wide, out, key, start)

    def _judge(self) -> None:
        """Look for NaN, infinity and overflow in the oldest batch; what it holds on the device is free then."""
        batch = self._unjudged.popleft()
        assert batch.done is not None, "started"
        batch.done.wait()
        assert batch.lengths is not None, "computed"
        fine = iter(length < limit for length, limit in zip(batch.lengths.tolist(), batch.limits, strict=True))
        for one in batch.results:
            step = one.target.step
            suspicious = not next(fine)
            hidden = [] if step.propagates else [not next(fine) for _ in one.values]
            bad = 0
            for i, (read, value) in enumerate(zip(step.reads, one.values, strict=True)):
                if suspicious or (hidden and hidden[i]):
                    bad += self._job.count_nonfinite(read, value)
            if suspicious:
                assert one.wide is not None, "computed"
                self._job.count_overflow(step, one.wide, one.dtype, finite=not bad)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _bring(result: _Result, start: int, into: Tensor) -> None:
    assert result.out is not None, "computed"
    _copy(result.out.reshape(-1).view(torch.uint8)[start : start + into.numel()], into)


def _write(there: Mark, target: Target, offset: int, data: Tensor) -> None:
    there.wait()
    target.sink.write(target.step.name, offset, as_bytes(data))


def _scaled(reads: Sequence[Read], values: list[Tensor]) -> list[Tensor]:
    """Multiply fp8 tensors with their factors, which come last."""
    factors = iter(values[len(reads) :])
    pairs = zip(reads, values, strict=False)
    return [value if read.scale is None else scaled(value, next(factors)) for read, value in pairs]


def _length(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    wide = cast.accumulator(x.dtype)
    found: Tensor = torch.linalg.vector_norm(flat.to(wide) if x.dtype.itemsize == 1 else flat, dtype=wide)
    return found.double()


def _limit(dtype: torch.dtype) -> float:
    """Return a length that no vector with an element beyond a type's range is below; see `worker.bounded`."""
    return 0.7 * min(cast.limit(dtype), 1e18)


def _cost(piece: Piece) -> int:
    """Return the bytes that a piece reads and writes."""
    if piece.group[0].step.whole:
        return sum(target.step.cost for target in piece.group)
    bits = [
        target.step.spec.dtype.bits + sum(read.spec.dtype.bits for read in target.step.reads) for target in piece.group
    ]
    return sum(piece.size * one // 8 for one in bits)
