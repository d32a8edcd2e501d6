"""What one thread of a run does with a block, and the memory it does it in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels import cast
from sdmerge.dtypes import TORCH

if TYPE_CHECKING:
    from sdmerge.run import Job
    from sdmerge.step import Read, Step

BLOCK = 1 << 18
"""Elements in a block: a few buffers of this size stay in a core's cache, and the cost of a call is spread thin."""
_WIDEST = 8


class _Buffer:
    """Memory for the raw bytes of one block, as a tensor and as something to read into."""

    def __init__(self, *, pinned: bool) -> None:
        self._tensor = torch.empty(BLOCK * _WIDEST, dtype=torch.uint8, pin_memory=pinned)
        self._view = as_bytes(self._tensor)

    def window(self, nbytes: int, dtype: torch.dtype) -> tuple[memoryview, Tensor]:
        """Return the first `nbytes`, as bytes and as numbers."""
        return self._view[:nbytes], self._tensor[:nbytes].view(dtype)


class _Prepared:
    """What does not change between the blocks of a step: looked up once."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.reads = [(read.source.read_into, read.key, read.spec.dtype.bits) for read in step.reads]
        self.types = [TORCH.get(read.spec.dtype, torch.uint8) for read in step.reads]
        self.bits = step.spec.dtype.bits
        self.type = TORCH.get(step.spec.dtype, torch.uint8)
        self.wide = cast.accumulator(*self.types)
        self.copies = step.compute is None and step.reads[0].spec.dtype == step.spec.dtype
        self.checked = step.spec.dtype.is_float and step.spec.dtype in TORCH
        self.moved = self.bits + sum(bits for _, _, bits in self.reads)


class Worker:
    """A thread's own buffers, and what it does with a block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sink = job.sink
        self._saturate = job.options.overflow == "saturate"
        self._pinned = job.device.type == "cuda"
        self._stream = torch.cuda.Stream(job.device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._inputs: list[_Buffer] = []
        self._output = _Buffer(pinned=self._pinned)
        self._prepared: _Prepared | None = None

    def do(self, step: Step, start: int, count: int) -> int:
        """Read, compute and write one block, or one whole tensor; return the number of bytes moved."""
        if step.whole:
            with self._job.whole:
                self._whole(step)
            return step.cost
        prepared = self._prepared
        if prepared is None or prepared.step is not step:
            prepared = self._prepared = _Prepared(step)
        if prepared.copies:
            self._copy(prepared, start, count)
        elif self._stream is None:
            self._blockwise(prepared, start, count)
        else:
            with torch.cuda.stream(self._stream):
                self._blockwise(prepared, start, count)
        return count * prepared.moved // 8

    def _copy(self, this: _Prepared, start: int, count: int) -> None:
        offset, nbytes = (
            start * this.bits // 8,
            count * this.bits // 8,
        )  # blocks of whole bytes: BLOCK is a multiple of 8
        data, values = self._output.window(nbytes, this.type)
        read_into, key, _ = this.reads[0]
        read_into(key, offset, data)
        if this.checked:
            wide = values.to(this.wide)
            if not bounded(wide, this.wide):
                self._job.count_nonfinite(this.step.reads[0], wide)
        self._sink.write(this.step.name, offset, data)

    def _blockwise(self, this: _Prepared, start: int, count: int) -> None:
        step = this.step
        values = self._read_block(this, start, count)
        result = step.compute(*values) if step.compute is not None else values[0].to(this.wide)
        self._check(step, values, result, this.type)
        offset = start * this.bits // 8
        data, out = self._output.window(count * this.bits // 8, this.type)
        if self._stream is None:
            cast.narrow(result, out, saturate=self._saturate)
        else:
            rounded = torch.empty(count, dtype=this.type, device=result.device)
            out.copy_(cast.narrow(result, rounded, saturate=self._saturate), non_blocking=True)
            self._stream.synchronize()
        self._sink.write(step.name, offset, data)

    def _read_block(self, this: _Prepared, start: int, count: int) -> list[Tensor]:
        """Return one block of each input: as stored for a mixed step, else in the type to compute in."""
        while len(self._inputs) < len(this.reads):
            self._inputs.append(_Buffer(pinned=self._pinned))
        values = []
        for (read_into, key, bits), dtype, buffer in zip(this.reads, this.types, self._inputs, strict=False):
            data, value = buffer.window(count * bits // 8, dtype)
            read_into(key, start * bits // 8, data)
            if self._stream is not None:
                value = value.to(self._job.device, non_blocking=True)
            values.append(value if this.step.mixed else value.to(this.wide))
        return values

    def _whole(self, step: Step) -> None:
        """Whole tensors, scaled where they are fp8 with a factor. Memory is what the tensors take."""
        values = [whole(read).to(self._job.device) for read in step.reads]
        assert step.compute is not None, "only a computation needs whole tensors"
        result = step.compute(*values)
        dtype = TORCH[step.spec.dtype]
        out = torch.empty(step.spec.shape, dtype=dtype)
        if step.spec.dtype.is_float:
            self._check(step, values, result, dtype)
            cast.narrow(result.cpu(), out, saturate=self._saturate)
        else:
            out.copy_(result)
        if step.spec.nbytes:
            self._sink.write(step.name, 0, as_bytes(out))

    def _check(self, step: Step, values: list[Tensor], result: Tensor, dtype: torch.dtype) -> None:
        """Look for NaN, infinity and overflow: one cheap reduction where all is well."""
        suspicious = not bounded(result, dtype)
        bad = 0
        if suspicious or not step.propagates:
            for read, value in zip(step.reads, values, strict=True):
                if suspicious or not bounded(value.to(result.dtype), torch.float32):
                    bad += self._job.count_nonfinite(read, value)
        if suspicious:
            self._job.count_overflow(step, result, dtype, finite=not bad)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable, as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def whole(read: Read) -> Tensor:
    """Return one tensor, widened to float32 (float64 stays), times its factor where it has one."""
    values = _stored(read, read.key).reshape(read.spec.shape)
    values = values.to(cast.accumulator(values.dtype))
    if read.scale is None:
        return values
    factor = _stored(read, read.scale).float()
    return values * (factor if factor.numel() == 1 else factor.reshape(-1, *[1] * (values.dim() - 1)))


def _stored(read: Read, key: str) -> Tensor:
    spec = read.source.specs[key]
    dtype = TORCH[spec.dtype]
    if not spec.nbytes:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(read.source.read(key), dtype=dtype)


def bounded(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether no element can be NaN, infinite or too large for `dtype`. May say no where all is well, never yes wrongly.

    If the sum of squares is below the limit's square, so is every square; NaN and infinity make the comparison false.
    A sum is cheaper than a look at each element. The half leaves room for the sum's own rounding.
    """
    flat = values.reshape(-1)
    return bool(torch.dot(flat, flat).item() < 0.5 * min(cast.limit(dtype), 1e18) ** 2)
