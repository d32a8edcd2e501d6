"""What one thread of a run does with a block, and the memory it does it in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels import cast, native, philox, rounding
from sdmerge.dtypes import TORCH
from sdmerge.expression import Call, InTiles
from sdmerge.whole import as_bytes, part_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdformats.tensor import TensorSink
    from sdkernels.linear import Term
    from sdmerge.expression import Change
    from sdmerge.run import Job
    from sdmerge.step import Step
    from sdmerge.whole import Memory

BLOCK = 1 << 18
"""Elements in a block: a few buffers of this size stay in a core's cache, and the cost of a call is spread thin."""
SUM_BLOCK = 1 << 17
"""The same for sums that native code reads and makes in one go: all inputs stay in the cache together."""
RUN = 1 << 20
"""Elements that a thread takes at a time: some blocks of either size."""
WIDEST = 8
"""Bytes of the widest element."""
BAND = 1 << 20
"""Elements of the rows of a matrix that are read, changed and written at a time."""
LEAST_ROWS = 128
"""The fewest such rows, where there are as many: factors are gone through once for all of them."""
FOR_BANDS = 32 << 20
"""Bytes that are kept for them, or less: what is not used of memory takes none."""
TILE = 1 << 12
"""Most columns of a tile of a matrix that is added to."""
TILE_SIZE = 1 << 19
"""Elements of such a tile: products of this size run at nearly the full rate, and threads seldom wait for the interpreter."""


@dataclass(frozen=True, slots=True)
class Target:
    """A step, and the sink that takes its tensor."""

    step: Step
    sink: TensorSink


Group = tuple[Target, ...]
"""Steps that are made from the same reads: one for each output."""


class _Buffer:
    """Memory for the raw bytes of one block, as a tensor and as something to read into."""

    def __init__(self) -> None:
        self._tensor = torch.empty(BLOCK * WIDEST, dtype=torch.uint8)
        self._view = as_bytes(self._tensor)

    def window(self, nbytes: int, dtype: torch.dtype) -> tuple[memoryview, Tensor]:
        """Return the first `nbytes`, as bytes and as numbers."""
        assert nbytes <= len(self._view), "blocks are no larger than their memory"
        return self._view[:nbytes], self._tensor[:nbytes].view(dtype)


class _Prepared:
    """What does not change between the blocks of a step: looked up once."""

    def __init__(self, target: Target) -> None:
        step = self.step = target.step
        self.write = target.sink.write
        self.reads = [(read.source.read_into, read.key, read.spec.dtype.bits) for read in step.reads]
        self.types = [TORCH.get(read.spec.dtype, torch.uint8) for read in step.reads]
        self.bits = step.spec.dtype.bits
        self.type = TORCH.get(step.spec.dtype, torch.uint8)
        self.wide = cast.accumulator(*self.types)
        self.copies = step.compute is None and step.reads[0].spec.dtype == step.spec.dtype
        self.checked = step.spec.dtype.is_float and step.spec.dtype in TORCH
        self.moved = self.bits + sum(bits for _, _, bits in self.reads)
        summed = step.compute is None or (isinstance(step.compute, Call) and step.compute.summed and step.propagates)
        self.summed = summed and all(map(native.serves, (self.type, *self.types)))

    def terms(self, values: Sequence[Tensor]) -> Sequence[Term]:
        """Return what adds up to the result, for a step that is `summed`."""
        compute = self.step.compute
        return compute.terms(values) if isinstance(compute, Call) else [(1.0, values[0])]


class _Sums:
    """Sums of a group, looked up once and then made for run after run: what lies in files as it is, native code reads.

    They are judged by their results: what is not finite in an input shows there.
    """

    def __init__(self, steps: Sequence[_Prepared], inputs: Sequence[_Buffer], outputs: Sequence[_Buffer]) -> None:
        lead = steps[0]
        widest = max(bits for one in steps for bits in (one.bits, *(bits for _, _, bits in one.reads))) // 8
        rows = max(1, BLOCK * WIDEST // (SUM_BLOCK * widest))
        self.count = rows * SUM_BLOCK
        self._places: list[tuple[Tensor, int, int, int]] = []
        self._reads: list[tuple[Callable[[str, int, memoryview], None], str, int, memoryview]] = []
        values = []
        for buffer, read, (read_into, key, bits), dtype in zip(
            inputs, lead.step.reads, lead.reads, lead.types, strict=True
        ):
            extent = read.source.extent(key)
            data, value = buffer.window((SUM_BLOCK if extent else self.count) * bits // 8, dtype)
            values.append(value.view(-1, SUM_BLOCK).expand(rows, SUM_BLOCK))
            if extent:
                self._places.append((value, *extent, bits // 8))
            else:
                self._reads.append((read_into, key, bits // 8, data))
        windows = [
            buffer.window(self.count * one.bits // 8, one.type) for one, buffer in zip(steps, outputs, strict=True)
        ]
        self._outputs = [(one, data) for one, (data, _) in zip(steps, windows, strict=True)]
        sums = native.sums(
            [(one.terms(values), out.view(rows, -1)) for one, (_, out) in zip(steps, windows, strict=True)]
        )
        assert sums is not None, "matrices of types that native code serves"
        self._add_up = sums

    def do(self, start: int, count: int) -> list[_Prepared]:
        """Read, add up and write; return the steps that were not: their result is not finite, or an input cannot be read."""
        for read_into, key, width, data in self._reads:
            read_into(key, start * width, data[: count * width])
        parts = [native.FilePart(file, offset + start * width, row) for row, file, offset, width in self._places]
        finite = self._add_up(count, parts) or [False] * len(self._outputs)
        for (one, data), good in zip(self._outputs, finite, strict=True):
            if good:
                one.write(one.step.name, start * one.bits // 8, data[: count * one.bits // 8])
        return [one for (one, _), good in zip(self._outputs, finite, strict=True) if not good]


@dataclass(frozen=True, slots=True)
class _Addition:
    """What is added to a matrix.

    Attributes:
        step: reads nothing but the matrix.
        change: what is added.
        tile: memory for a tile of it.
        faults: counts what is not finite in the tensors that the change is made of, and refuses it where it may not be.
    """

    step: Step
    change: Change
    tile: Tensor
    faults: Callable[[], int]


class Worker:
    """A thread's own buffers, and what it does with a block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._saturate = job.options.overflow == "saturate"
        self._rounding = job.options.stochastic_rounding
        self._inputs: list[_Buffer] = []
        self._outputs = [_Buffer()]
        self._prepared: tuple[_Prepared, ...] = ()
        self._sums: _Sums | None = None

    def do(self, group: Group, start: int, count: int) -> int:
        """Read once, then compute and write some blocks, or one whole tensor, for each output; return the bytes moved."""
        first = group[0].step
        if first.whole:
            with self._job.room(first.memory):
                self._whole(group)
            return sum(target.step.cost for target in group)
        if not self._prepared or self._prepared[0].step is not first:
            self._prepared = tuple(_Prepared(target) for target in group)
            self._sums = None
        self._in_blocks(start, count)
        return sum(count * one.moved // 8 for one in self._prepared)

    def _in_blocks(self, start: int, count: int) -> None:
        do: Callable[[int, int], None]
        lead = self._prepared[0]
        if lead.copies:
            do, size = partial(self._copy, lead), BLOCK
        elif self._rounding is None and all(one.summed for one in self._prepared):
            self._sums = self._sums or self._new_sums()
            do, size = partial(self._add_up, self._sums), self._sums.count
        else:
            do, size = partial(self._blockwise, self._prepared), BLOCK
        for at in range(start, start + count, size):
            do(at, min(size, start + count - at))

    def _new_sums(self) -> _Sums:
        count = len(self._prepared)
        return _Sums(
            self._prepared, _buffers(self._inputs, len(self._prepared[0].reads)), _buffers(self._outputs, count)
        )

    def _add_up(self, sums: _Sums, start: int, count: int) -> None:
        if left := sums.do(start, count):
            for at in range(start, start + count, BLOCK):
                self._blockwise(left, at, min(BLOCK, start + count - at))

    def _copy(self, lead: _Prepared, start: int, count: int) -> None:
        offset, nbytes = (
            start * lead.bits // 8,
            count * lead.bits // 8,
        )  # blocks of whole bytes: BLOCK is a multiple of 8
        data, values = self._outputs[0].window(nbytes, lead.type)
        read_into, key, _ = lead.reads[0]
        read_into(key, offset, data)
        if lead.checked and not finite(values):
            self._job.count_nonfinite(lead.step.reads[0], values)
        for one in self._prepared:
            one.write(one.step.name, offset, data)

    def _blockwise(self, steps: Sequence[_Prepared], start: int, count: int) -> None:
        values = self._read_block(steps[0], start, count)
        for one in steps:
            self._emit(one, values, start)

    def _emit(self, this: _Prepared, values: list[Tensor], start: int) -> None:
        """Compute, check, round and write one block."""
        step, count = this.step, values[0].numel()
        result = step.compute(values, start) if step.compute is not None else values[0].to(this.wide)
        self._check(step, values, result, this.type)
        data, out = self._outputs[0].window(count * this.bits // 8, this.type)
        self._round(step, result, out, start)
        this.write(step.name, start * this.bits // 8, data)

    def _read_block(self, this: _Prepared, start: int, count: int) -> list[Tensor]:
        """Return one block of each input, as stored."""
        values = []
        buffers = _buffers(self._inputs, len(this.reads))
        for (read_into, key, bits), dtype, buffer in zip(this.reads, this.types, buffers, strict=True):
            data, value = buffer.window(count * bits // 8, dtype)
            read_into(key, start * bits // 8, data)
            values.append(value)
        return values

    def _whole(self, group: Group) -> None:
        """Whole tensors, scaled where they are fp8 with a factor. Memory is what the tensors take."""
        in_bands = _read_in_bands(group)
        with self._job.pool.lend(group[0].step.memory + FOR_BANDS) as memory:
            values = [
                torch.empty(read.spec.shape, dtype=TORCH[read.spec.dtype], device="meta")
                if i == in_bands
                else whole(read, memory(read.spec.nbytes))
                for i, read in enumerate(group[0].step.reads)
            ]
            for target in group:
                if isinstance(target.step.compute, Call) and target.step.compute.in_blocks:
                    self._measured(target, target.step.compute, values)
                elif isinstance(target.step.compute, InTiles) and values[target.step.compute.index].dim():
                    self._in_tiles(target, target.step.compute, values, memory)
                else:
                    self._at_once(target, values)
            del values

    def _measured(self, target: Target, call: Call, values: list[Tensor]) -> None:
        """Measure whole tensors, then compute and write block by block."""
        found = call.measure(values)
        blocks = replace(target.step, compute=partial(call, measured=found), whole=False)
        this = _Prepared(replace(target, step=blocks))
        flat = [value.reshape(-1) for value in values]
        for start in range(0, blocks.spec.numel, BLOCK):
            self._emit(this, [value[start : start + BLOCK] for value in flat], start)

    def _in_tiles(self, target: Target, compute: InTiles, values: list[Tensor], memory: Memory) -> None:
        """Add its change to what is stored, some rows at a time: in one pass where there is one, else tile by tile."""
        weight = values[compute.index]
        flat = weight.reshape(weight.shape[0], -1)
        height, width, dtype = *flat.shape, TORCH[target.step.spec.dtype]
        others = list(zip(target.step.reads, values, strict=True))
        read, _ = others.pop(compute.index)
        rows = max(1, min(max(LEAST_ROWS, BAND // max(1, width)), height))
        buffer = memory(rows * width * flat.dtype.itemsize) if flat.is_meta else None
        results = memory(rows * width * dtype.itemsize).view(dtype)
        addition = _Addition(
            replace(target.step, reads=(read,)),
            compute.prepare(values, memory),
            memory(max(TILE_SIZE, width) * WIDEST),
            cache(lambda: sum(self._job.count_nonfinite(*other) for other in others)),
        )
        for row in range(0, height if flat.numel() else 0, rows):
            stored = flat[row : row + rows]
            if buffer is not None:
                stored = part_of(read, row * width, stored.shape, buffer)
            out = results[: stored.numel()].view(stored.shape)
            if self._rounding is not None or not addition.change.add(stored, out, row):
                self._fill_band(addition, stored, out, row)
            target.sink.write(target.step.name, row * width * dtype.itemsize, as_bytes(out))

    def _fill_band(self, addition: _Addition, stored: Tensor, out: Tensor, row: int) -> None:
        """Make one tile of the change after the other, and add it to what is stored while it is in the cache."""
        height, width = stored.shape
        # Random numbers are drawn in the order of the elements, which whole rows are in.
        whole_rows = addition.change.whole_rows or self._rounding is not None
        columns = width if whole_rows else min(TILE, width)
        rows = max(1, min(TILE_SIZE // columns, height))
        tiles = addition.tile.view(cast.accumulator(stored.dtype))
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                part = stored[top : top + rows, left : left + columns]
                tile = tiles[: part.numel()].view(part.shape)
                addition.change.fill(tile, row + top, left)
                place = out[top : top + rows, left : left + columns]
                self._end_tile(addition, part, tile, place, (row + top) * width + left)

    def _end_tile(self, addition: _Addition, stored: Tensor, change: Tensor, place: Tensor, start: int) -> None:
        """Add what is stored to its change, check, and round into place: in one pass where native code can and all is well."""
        if self._rounding is None and native.combine_into([(1.0, stored), (1.0, change)], place):
            return
        tile = change.add_(stored.to(change.dtype))  # there is no sum with fp8
        self._check(addition.step, [stored], tile, place.dtype, addition.faults)
        place.copy_(self._round(addition.step, tile, torch.empty(tile.shape, dtype=place.dtype), start))

    def _at_once(self, target: Target, values: list[Tensor]) -> None:
        step = target.step
        assert step.compute is not None, "a copy is not whole"
        result = step.compute(values, 0)
        dtype = TORCH[step.spec.dtype]
        out = torch.empty(step.spec.shape, dtype=dtype)
        if step.spec.dtype.is_float:
            self._check(step, values, result, dtype)
            self._round(step, result, out, 0)
        else:
            out.copy_(result)
        if step.spec.nbytes:
            target.sink.write(step.name, 0, as_bytes(out))

    def _round(self, step: Step, result: Tensor, out: Tensor, start: int) -> Tensor:
        """Round once, to nearest or by chance; `start` is the index of the first element in the tensor."""
        if self._rounding is None:
            return cast.narrow(result, out, saturate=self._saturate)
        if self._saturate:
            top = torch.finfo(out.dtype).max
            result = result.clamp(-top, top)
        return rounding.stochastic(result, out, philox.key(self._rounding, f"{step.name}: rounding"), start)

    def _check(
        self,
        step: Step,
        values: list[Tensor],
        result: Tensor,
        dtype: torch.dtype,
        faults: Callable[[], int] = lambda: 0,
    ) -> None:
        """Look for NaN, infinity and overflow: one cheap reduction where all is well. `faults`: see `_Addition`."""
        suspicious = not bounded(result, dtype)
        bad = faults() if suspicious else 0
        if suspicious or not step.propagates:
            for read, value in zip(step.reads, values, strict=True):
                if suspicious or not finite(value):
                    bad += self._job.count_nonfinite(read, value)
        if suspicious:
            self._job.count_overflow(step, result, dtype, finite=not bad)


def _read_in_bands(group: Group) -> int | None:
    """Return which read of a step can be read piece by piece, because it is only added to; None for none."""
    step = group[0].step
    if len(group) > 1 or not isinstance(step.compute, InTiles) or step.compute.room is None:
        return None
    index = step.compute.index
    read = step.reads[index]
    return index if read.spec.shape and read.scale is None else None


def _buffers(held: list[_Buffer], count: int) -> list[_Buffer]:
    """Return as many as are needed of what is held; more are made where there are too few."""
    held += [_Buffer() for _ in range(count - len(held))]
    return held[:count]


def finite(values: Tensor) -> bool:
    """Whether no element can be NaN or infinite: then their sum is neither. May say no where all is well (it overflows)."""
    told = native.finite(values)
    if told is not None:
        return told
    if values.dtype.itemsize == 1:  # there is no sum of these
        values = values.float()
    return math.isfinite(values.sum().item())


def bounded(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether no element can be NaN, infinite or too large for `dtype`. May say no where all is well, never yes wrongly.

    If the sum of squares is below the limit's square, so is every square; NaN and infinity make the comparison false.
    A sum is cheaper than a look at each element. The half leaves room for the sum's own rounding.
    """
    flat = values.reshape(-1)
    return bool(torch.dot(flat, flat).item() < 0.5 * min(cast.limit(dtype), 1e18) ** 2)
