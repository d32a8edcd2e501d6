"""Work in blocks, shared out among threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVarTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

Block = TypeVarTuple("Block")
"""What says which block it is: a worker's arguments."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST_THREADS = 8


def in_threads(
    blocks: Iterator[tuple[*Block]],
    make_worker: Callable[[], AbstractContextManager[Callable[[*Block], int]]],
    *,
    threads: int | None,
    name: str,
    progress: Callable[[int], None],
) -> None:
    """Do all blocks. Threads take them in order; after an error, or an exception from `progress`, they take no more.

    Args:
        blocks: read by one thread at a time.
        make_worker: entered once in each thread, for a function with buffers of its own; that one is called with what
            `blocks` gives, and returns a number of bytes. It is left when there are no more blocks.
        threads: how many; None takes the processor's cores, 8 at most.
        name: what the threads' names begin with.
        progress: called from this thread with the number of bytes done since the last call.

    Raises:
        BaseException: the first that a thread met.
    """
    keep_freed_memory()
    team = _Team(blocks, make_worker)
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over blocks: one thread each, the same outcome for any number of them
    count = threads or min(_MOST_THREADS, available_cores())
    members = [threading.Thread(target=team.work, name=f"{name}-{i}", daemon=True) for i in range(count)]
    try:
        for member in members:
            member.start()
        while any(member.is_alive() for member in members):
            for member in members:
                member.join(0.05)
            progress(team.take_progress())
    finally:
        team.stop.set()
        for member in members:
            if member.is_alive():  # a signal may have come before it was started
                member.join()
        torch.set_num_threads(intra_op)
    progress(team.take_progress())
    if team.error is not None:
        raise team.error


class _Team(Generic[*Block]):
    """What the threads share."""

    def __init__(
        self,
        blocks: Iterator[tuple[*Block]],
        make_worker: Callable[[], AbstractContextManager[Callable[[*Block], int]]],
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._blocks = blocks
        self._make_worker = make_worker
        self._lock = threading.Lock()
        self._done = 0

    def work(self) -> None:
        """Take blocks until there are none, or until someone fails."""
        try:
            torch.set_num_threads(1)  # the number that MKL goes by is each thread's own
            with torch.inference_mode(), self._make_worker() as do:
                while not self.stop.is_set():
                    with self._lock:
                        block = next(self._blocks, None)
                    if block is None:
                        return
                    self._advance(do(*block))
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count

    def take_progress(self) -> int:
        with self._lock:
            done, self._done = self._done, 0
        return done


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
