"""Large outputs past the page cache: whole aligned chunks go from our own memory to the disk, in a thread of their own.

A write through the page cache costs a copy, a page for each 4 KiB, and work to bring that page to the disk; a merge of
files that lie in the cache already is bound by such work. Direct writes (``O_DIRECT``) take next to none, and the inputs
stay in the cache. They ask for aligned memory, offsets and lengths, so pieces are put together to chunks first. Where the
system or the file system has no such writes, everything goes the plain way.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from contextlib import suppress

import numpy as np

from sdformats.positional import OutputHandle

CHUNK = 2 << 20
CHUNKS = 16
"""How many chunks there are at most: those that are being put together, and those that wait for the disk."""
LEAST = 32 << 20
"""Bytes of the smallest output that is worth it."""
WRITERS = 2
"""Threads that write: the disk has the next chunk to do while one of them waits for its turn."""
_ALIGNMENT = 4096
"""Of memory, offsets and lengths: what every usual disk is content with."""


class _Chunk:
    """Memory for one chunk of the file, and what of it was written."""

    def __init__(self) -> None:
        room = np.empty(CHUNK + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        self.memory = room[start : start + CHUNK]
        self.assign(-1)

    def assign(self, index: int) -> None:
        """Make it the `index`-th chunk of the file, of which nothing was written."""
        self.index = index
        self.filled = 0
        """Bytes that were written, some perhaps twice."""
        self.parts: list[tuple[int, int]] = []
        """Where each piece begins and ends."""
        self.users = 0
        """Threads that are writing to the memory now."""


class DirectWriter:
    """Puts pieces together and writes them, first come, first served: of two pieces for one place the later one stays.

    Args:
        direct: a descriptor of the output for direct writes.
        plain: one for all that is no whole aligned page. Both are closed in the end.
        size: bytes of the output.
    """

    def __init__(self, direct: int, plain: int, size: int) -> None:
        self._direct = direct
        self._refused = False
        self._plain = OutputHandle(plain)
        self._size = size
        self._changed = threading.Condition()
        self._open: dict[int, _Chunk] = {}
        self._due: deque[_Chunk] = deque()
        self._free: list[_Chunk] = []
        self._made = 0
        self._unwritten: set[int] = set()
        self._running = WRITERS
        self._starved = 0
        self._ending = self._cancelled = False
        self._error: OSError | None = None
        self._threads = [threading.Thread(target=self._run, name="sdmerge-write", daemon=True) for _ in range(WRITERS)]
        for thread in self._threads:
            thread.start()

    @classmethod
    def of(cls, fd: int, size: int) -> DirectWriter | None:
        """Return a writer for an open output of `size` bytes; None where there are no direct writes, or no need."""
        if not (hasattr(os, "O_DIRECT") and hasattr(os, "pwrite")) or size < LEAST:
            return None
        with suppress(OSError):
            return cls(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC), os.dup(fd), size)
        return None

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take bytes. May be called from several threads at once. Raises OSError as an earlier write to the disk did."""
        data, done = np.frombuffer(buffer, np.uint8), 0
        while done < len(data):
            index, start = divmod(offset + done, CHUNK)
            count = min(len(data) - done, CHUNK - start)
            chunk = self._take(index)
            np.copyto(chunk.memory[start : start + count], data[done : done + count])
            self._put(chunk, start, start + count)
            done += count

    def drain(self) -> None:
        """Wait until all that was taken can be read from the file. Raises OSError as `write`."""
        with self._changed:
            for chunk in list(self._open.values()):
                self._send(chunk)
            self._changed.wait_for(lambda: not self._unwritten or self._error is not None)
            self._raise()

    def finish(self) -> None:
        """Write all that is left, and end. Raises OSError as `write`."""
        self.drain()
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def cancel(self) -> None:
        """Write no more. A write that is under way is not waited for."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _take(self, index: int) -> _Chunk:
        """Return the chunk to write to, as soon as there is memory for it."""
        with self._changed:
            while True:
                self._raise()
                if self._cancelled:
                    raise OSError(errno.ECANCELED, "the output was given up")
                chunk = None if index in self._unwritten else self._open.get(index) or self._new(index)
                if chunk is not None:
                    chunk.users += 1
                    return chunk
                idle = next((one for one in self._open.values() if not one.users), None)
                if idle is not None and not self._unwritten:
                    self._send(idle)  # all wait for pieces that may come late: the oldest goes as it is
                self._starved += 1
                self._changed.wait()
                self._starved -= 1

    def _new(self, index: int) -> _Chunk | None:
        if self._free:
            chunk = self._free.pop()
        elif self._made < CHUNKS:
            chunk = _Chunk()
            self._made += 1
        else:
            return None
        chunk.assign(index)
        self._open[index] = chunk
        return chunk

    def _put(self, chunk: _Chunk, start: int, end: int) -> None:
        with self._changed:
            chunk.users -= 1
            chunk.filled += end - start
            chunk.parts.append((start, end))
            if chunk.filled >= self._length(chunk) and not chunk.users:
                self._send(chunk)
            elif self._starved and not chunk.users:
                self._changed.notify_all()

    def _send(self, chunk: _Chunk) -> None:
        del self._open[chunk.index]
        self._due.append(chunk)
        self._unwritten.add(chunk.index)
        self._changed.notify_all()

    def _length(self, chunk: _Chunk) -> int:
        return min(CHUNK, self._size - chunk.index * CHUNK)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._due or self._ending or self._cancelled)
                    if self._cancelled or not self._due:
                        return
                    chunk = self._due.popleft()
                self._store(chunk)
                with self._changed:
                    self._free.append(chunk)
                    self._unwritten.discard(chunk.index)
                    self._changed.notify_all()
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._running -= 1
                if not self._running:
                    os.close(self._plain.fd)
                    os.close(self._direct)

    def _store(self, chunk: _Chunk) -> None:
        """Write what there is of a chunk: whole pages directly, the ends of pieces that do not meet the plain way."""
        view = chunk.memory.data
        for start, end in _joined(chunk.parts):
            first, last = -(-start // _ALIGNMENT) * _ALIGNMENT, end // _ALIGNMENT * _ALIGNMENT
            if first >= last:
                first = last = end
            for low, high, write in (
                (start, first, self._plain.write),
                (first, last, self._store_pages),
                (last, end, self._plain.write),
            ):
                if low < high:
                    write(chunk.index * CHUNK + low, view[low:high])

    def _store_pages(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while not self._refused and done < len(buffer):
            try:
                done += os.pwrite(self._direct, buffer[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused = True  # a file system that opens files for direct writes, and does none
        self._plain.write(offset + done, buffer[done:])


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same places, each once, as few as they can be."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
