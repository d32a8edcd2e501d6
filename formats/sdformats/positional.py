"""Reading and writing at an offset, from several threads at once, without mmap.

A mapped file that is truncated by someone else kills the process with SIGBUS; a read that comes back short is an error
that can be told. Where the system has ``preadv`` and ``pwrite`` (Linux, macOS) one handle serves all threads; elsewhere
(Windows) each thread gets a handle of its own, which it may seek.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from sdformats.errors import ChangedFile, FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_BINARY = getattr(os, "O_BINARY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True, slots=True)
class Identity:
    """What must not change while a file is read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Take the identity from a ``stat`` result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class InputFile:
    """An open file, read at offsets.

    Raises:
        FormatError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle: BinaryIO | None = path.open("rb", buffering=0)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from error
        self.identity = Identity.of(os.fstat(self._handle.fileno()))
        self._per_thread = threading.local()
        self._opened: list[BinaryIO] = [self._handle]
        self._read: Callable[[memoryview, int], int] = self._preadv if hasattr(os, "preadv") else self._seek_and_read

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self.identity.size

    @property
    def descriptor(self) -> int | None:
        """What the file can be read at offsets with by several threads at once; None where the system has no such reads."""
        return self._handle.fileno() if self._handle is not None and hasattr(os, "preadv") else None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file.

        Raises:
            ChangedFile: the file ends too early.
            FormatError: the system reports an error while reading.
        """
        done = 0
        while done < len(buffer):
            try:
                got = self._read(buffer[done:], offset + done)
            except OSError as error:
                raise FormatError(f"cannot be read: {error.strerror or error}", path=self.path) from error
            if got <= 0:
                raise ChangedFile(
                    f"ends at byte {offset + done:,}, before the {len(buffer):,} bytes at {offset:,}",
                    path=self.path,
                    expected=f"{self.size:,} bytes, as when it was opened",
                    advice="the file was cut short while it was read",
                )
            done += got

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from byte `offset` on. `size` must be within the file."""
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def head(self, size: int) -> bytes:
        """Return the first `size` bytes, or fewer where the file is shorter."""
        return self.read(0, min(size, self.size))

    def check_unchanged(self) -> None:
        """Compare the file at `path` with what was opened.

        Raises:
            ChangedFile: size, time or identity is another.
        """
        try:
            now = Identity.of(self.path.stat())
        except OSError as error:
            raise ChangedFile(f"is gone: {error.strerror or error}", path=self.path) from error
        if now != self.identity:
            raise ChangedFile("changed while it was being read", path=self.path, advice="run again when it is still")

    def close(self) -> None:
        """Close every handle."""
        for handle in self._opened:
            handle.close()
        self._handle = None

    def _preadv(self, buffer: memoryview, offset: int) -> int:
        assert self._handle is not None, "read from a closed file"
        return os.preadv(self._handle.fileno(), [buffer], offset)

    def _seek_and_read(self, buffer: memoryview, offset: int) -> int:
        handle: BinaryIO | None = getattr(self._per_thread, "handle", None)
        if handle is None:
            handle = self.path.open("rb", buffering=0)
            self._per_thread.handle = handle
            self._opened.append(handle)
        handle.seek(offset)
        return handle.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


class OutputHandle:
    """A file descriptor, written at offsets, and read again."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._write: Callable[[memoryview, int], int] = self._pwrite if hasattr(os, "pwrite") else self._seek_and_write
        self._read: Callable[[memoryview, int], int] = self._preadv if hasattr(os, "preadv") else self._seek_and_read

    def write(self, offset: int, buffer: memoryview) -> None:
        """Put all of `buffer` at byte `offset`. Raises OSError as the system does."""
        done = 0
        while done < len(buffer):
            done += self._write(buffer[done:], offset + done)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, which must be within the file, from byte `offset`. Raises OSError as the system does."""
        done = 0
        while done < len(buffer):
            got = self._read(buffer[done:], offset + done)
            if got <= 0:
                raise OSError(errno.EIO, "the file became shorter")
            done += got

    def _pwrite(self, buffer: memoryview, offset: int) -> int:
        return os.pwrite(self.fd, buffer, offset)

    def _preadv(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self.fd, [buffer], offset)

    def _seek_and_read(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            os.lseek(self.fd, offset, os.SEEK_SET)
            got = os.read(self.fd, len(buffer))
        buffer[: len(got)] = got
        return len(got)

    def _seek_and_write(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            os.lseek(self.fd, offset, os.SEEK_SET)
            return os.write(self.fd, buffer)


def open_exclusive(path: Path, mode: int) -> int:
    """Create `path` for reading and writing, and fail if it is there already. Returns a descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | _CLOEXEC, mode)
