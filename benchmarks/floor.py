"""The I/O floor: what merely reading the inputs and writing one output of their size takes.

Each thread takes the next block of the output, reads that block of every input into one buffer that it uses
again and again, and writes it. There is no arithmetic, no header is parsed, and the buffer stays in the CPU's
cache. As in the product, the output is a temporary file of its final size that is forced to the disk and then
renamed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 1 << 20
FLUSH_EVERY = 64 << 20


def read_and_write(
    inputs: list[Path],
    output: Path,
    *,
    threads: int,
    overlap: bool,
    block: int = BLOCK,
    flush_every: int = FLUSH_EVERY,
) -> None:
    """Read every input once and write an output as large as the first.

    Args:
        inputs: files of about the same size, on a system that has ``preadv``.
        output: the file to write; replaced if it is there.
        threads: how many threads read and write.
        overlap: whether one more thread forces what is written to the disk meanwhile.
        block: bytes read and written at a time.
        flush_every: bytes written between two flushes, with `overlap`.

    Raises:
        OSError: as the system does.
    """
    temporary = output.with_name(f".{output.name}.floor")
    with contextlib.ExitStack() as files:
        files.callback(temporary.unlink, missing_ok=True)
        sources = [files.enter_context(path.open("rb", buffering=0)).fileno() for path in inputs]
        target = files.enter_context(temporary.open("wb", buffering=0)).fileno()
        size = os.fstat(sources[0]).st_size
        os.truncate(target, size)
        copy = _Copy(sources, target, size, block, itertools.count(0, block))
        flusher = Flusher(target, flush_every) if overlap else contextlib.nullcontext()
        with flusher as flushing, ThreadPoolExecutor(threads) as pool:
            for item in [pool.submit(copy.run, flushing) for _ in range(threads)]:
                item.result()
        os.fsync(target)
        temporary.replace(output)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class _Copy:
    """What the threads share: files, size and the offset of the next block."""

    sources: list[int]
    target: int
    size: int
    block: int
    offsets: Iterator[int]

    def run(self, flusher: Flusher | None) -> None:
        """Copy blocks until none is left."""
        buffer = memoryview(bytearray(self.block))
        while (offset := next(self.offsets)) < self.size:  # one step under the interpreter's lock
            part = buffer[: min(self.block, self.size - offset)]
            for source in self.sources:
                _fill(source, part, offset)
            done = 0
            while done < len(part):
                done += os.pwrite(self.target, part[done:], offset + done)
            if flusher is not None:
                flusher.wrote(len(part))


def _fill(source: int, part: memoryview, offset: int) -> None:
    done = 0
    while done < len(part):
        got = os.preadv(source, [part[done:]], offset + done)
        if got == 0:
            return  # an input a few bytes shorter than the first
        done += got


class Flusher:
    """Forces a file to the disk from a thread of its own, whenever `every` more bytes were written to it."""

    def __init__(self, target: int, every: int) -> None:
        self._target = target
        self._every = every
        self._pending = 0
        self._stop = False
        self._due = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._due:
            self._stop = True
            self._due.notify()
        self._thread.join()

    def wrote(self, count: int) -> None:
        """Count bytes that were written. May be called from several threads at once."""
        with self._due:
            self._pending += count
            if self._pending >= self._every:
                self._due.notify()

    def _run(self) -> None:
        sync = getattr(os, "fdatasync", os.fsync)
        while True:
            with self._due:
                self._due.wait_for(lambda: self._stop or self._pending >= self._every)
                if self._stop:
                    return
                self._pending = 0
            sync(self._target)
