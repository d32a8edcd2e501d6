"""A file that appears whole or not at all.

The bytes go to a temporary file in the target's folder, are forced to the disk, and take the target's name in one step.
On Linux the temporary file has no name (``O_TMPFILE``): whatever ends the process, nothing is left behind. Elsewhere it is
called ``.NAME.XXXXXXXX.sdmerge-tmp``, is locked while its writer lives, and the next run removes those whose writer is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
import threading
from pathlib import Path

from sdformats.direct import DirectWriter
from sdformats.errors import OutputExists, WriteError
from sdformats.positional import OutputHandle, open_exclusive

if sys.platform != "win32":
    import fcntl

SUFFIX = ".sdmerge-tmp"
_FLUSH_EVERY = 128 << 20
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT if hasattr(errno, "EDQUOT") else -1: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
}
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
"""How file systems without hard links, and systems that forbid them, say so."""


def check_place(path: Path, *, overwrite: bool) -> None:
    """Refuse early a place where no file can be written.

    Raises:
        WriteError: its folder does not exist.
        OutputExists: there is something, which may not be replaced.
    """
    if not path.parent.is_dir():
        raise WriteError(f"the folder {path.parent} does not exist", path=path, advice="create it first")
    if path.exists() and not overwrite:
        raise OutputExists.at(path)


class PendingFile:
    """A file of a known size on its way to `path`.

    Args:
        path: where the file will be. A symbolic link is written through: what it points at is replaced.
        size: how many bytes it will have.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputExists: there is a file and `overwrite` is false.
        WriteError: the folder is missing or read-only, or the disk has too little room.
    """

    def __init__(self, path: Path, size: int, *, overwrite: bool) -> None:
        self.path = path
        self.size = size
        self.target = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._old_mode = self._check_target()
        check_room(self.path, self.target.parent, size)
        remove_stale(self.target)
        self._temporary: Path | None = None
        try:
            fd = self._open()
        except OSError as error:
            raise self._failure(error) from error
        self._handle: OutputHandle | None = OutputHandle(fd)
        self._flusher = _Flusher(fd)
        self._direct: DirectWriter | None = None
        try:
            os.ftruncate(fd, size)
            self._direct = DirectWriter.of(fd, size)
        except OSError as error:
            self.abort()
            raise self._failure(error) from error

    def write(self, offset: int, buffer: memoryview) -> None:
        """Put bytes at `offset`. May be called from several threads at once."""
        assert self._handle is not None, "write after commit or abort"
        try:
            if self._direct is not None:
                self._direct.write(offset, buffer)
                return
            self._handle.write(offset, buffer)
            self._flusher.wrote(len(buffer))
        except OSError as error:
            raise self._failure(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of what was written."""
        assert self._handle is not None, "read after commit or abort"
        try:
            if self._direct is not None:
                self._direct.drain()
            self._handle.read_into(offset, buffer)
        except OSError as error:
            raise WriteError(f"cannot be read again: {error.strerror or error}", path=self.path) from error

    def commit(self) -> None:
        """Force everything to the disk and give the file its name, in one step.

        Raises:
            OutputExists: a file appeared at the target in the meantime and `overwrite` is false.
            WriteError: the system could not store it; nothing is left behind.
        """
        assert self._handle is not None, "commit after commit or abort"
        fd = self._handle.fd
        try:
            if self._old_mode is not None and hasattr(os, "fchmod"):
                os.fchmod(fd, self._old_mode)
            if self._direct is not None:
                self._direct.finish()
            self._flusher.finish()
            self._publish(fd)
            sync_folder(self.target.parent)
        except FileExistsError as error:
            self.abort()
            raise OutputExists.at(self.path) from error
        except OSError as error:
            self.abort()
            raise self._failure(error) from error
        except BaseException:
            self.abort()
            raise
        self._temporary = None
        self._close()

    def abort(self) -> None:
        """Remove the temporary file. Does nothing after `commit`, and does not wait for the disk."""
        if self._direct is not None:
            self._direct.cancel()
        self._flusher.cancel()
        self._close()
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _check_target(self) -> int | None:
        """Return the permissions of the file to be replaced, if there is one."""
        if not self.target.parent.is_dir():
            raise WriteError(
                f"the folder {self.target.parent} does not exist", path=self.path, advice="create it first"
            )
        try:
            status = self.target.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        if not stat.S_ISREG(status.st_mode):
            raise WriteError("is not a regular file", path=self.path, advice="choose another output")
        if not self._overwrite:
            raise OutputExists.at(self.path)
        return stat.S_IMODE(status.st_mode)

    def _open(self) -> int:
        folder = self.target.parent
        if hasattr(os, "O_TMPFILE"):
            with contextlib.suppress(OSError):
                fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
                if Path(_descriptor(fd)).exists():
                    _lock(fd)  # it will have a name for a moment
                    return fd
                os.close(fd)
        while True:
            self._temporary = temporary_name(self.target)
            fd = open_exclusive(self._temporary, 0o666)
            _lock(fd)
            if self._temporary.exists():
                return fd
            os.close(fd)  # another run took it for a stale one before it was locked

    def _publish(self, fd: int) -> None:
        if self._temporary is None:
            if not self._overwrite:
                _link_descriptor(fd, self.target)
                return
            self._temporary = temporary_name(self.target)
            _link_descriptor(fd, self._temporary)
        if sys.platform == "win32":
            self._close()  # an open file cannot be renamed there
            (self._temporary.replace if self._overwrite else self._temporary.rename)(self.target)
            return
        if self._overwrite:
            self._temporary.replace(self.target)
            return
        try:
            os.link(self._temporary, self.target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if self.target.exists():
                raise FileExistsError(errno.EEXIST, "file exists") from None
            self._temporary.rename(self.target)
        else:
            self._temporary.unlink()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle.fd)

    def _failure(self, error: OSError) -> WriteError:
        cause = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        return WriteError(f"cannot be written: {cause}", path=self.path)


class _Flusher:
    """Forces a file to the disk in a thread: early, so that the last sync is short, and so that signals reach whoever waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = 0
        self._due = threading.Condition()
        self._last = False
        self._stop = False
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def wrote(self, count: int) -> None:
        with self._due:
            self._pending += count
            if self._pending < _FLUSH_EVERY:
                return
            if self._error is not None:
                raise self._error
            self._wake()

    def finish(self) -> None:
        """Wait until all is on the disk. What an earlier sync met is raised too: the system reports a fault only once."""
        with self._due:
            self._last = True
            thread = self._wake()
        thread.join()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Sync no more. A sync that is under way is not waited for: it may take long, and has a descriptor of its own."""
        with self._due:
            self._stop = True
            self._due.notify()
        if sys.platform == "win32" and self._thread is not None:
            self._thread.join()  # an open file cannot be removed there

    def _wake(self) -> threading.Thread:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(os.dup(self._fd),), name="sdmerge-flush", daemon=True
            )
            self._thread.start()
        self._due.notify()
        return self._thread

    def _run(self, fd: int) -> None:
        last = False
        try:
            while not last:
                with self._due:
                    self._due.wait_for(lambda: self._stop or self._last or self._pending >= _FLUSH_EVERY)
                    if self._stop:
                        return
                    last, self._pending = self._last, 0
                (_sync if last else _sync_data)(fd)
                if not last and hasattr(
                    os, "posix_fadvise"
                ):  # what is on the disk leaves the cache, for what comes next
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._error = error
        finally:
            os.close(fd)


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a small file, which appears whole or not at all.

    Raises:
        OutputExists, WriteError: it cannot be written.
    """
    file = PendingFile(path, len(data), overwrite=overwrite)
    try:
        file.write(0, memoryview(data))
        file.commit()
    finally:
        file.abort()


def check_room(path: Path, folder: Path, size: int) -> None:
    """Raise WriteError, about the output `path`, where `folder` has less than `size` bytes of room."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise WriteError(
            f"needs {size:,} bytes, and {free:,} are free in {folder}",
            path=path,
            advice="make room or choose another folder",
        )


def temporary_name(target: Path) -> Path:
    """Return a new name in the folder of `target`, by which a later run to the same target knows what it is."""
    return target.with_name(f".{stem(target)}.{secrets.token_hex(4)}{SUFFIX}")


def stem(target: Path) -> str:
    """Return the name of `target`, cut to leave room for the rest of a temporary name within 255 bytes."""
    return target.name.encode()[:200].decode(errors="ignore")


def remove_stale(target: Path) -> None:
    """Remove temporary files of earlier runs to the same target whose writer is gone."""
    prefix = f".{stem(target)}."
    for entry in sorted(target.parent.iterdir()) if os.access(target.parent, os.R_OK) else ():
        if not (entry.name.startswith(prefix) and entry.name.endswith(SUFFIX)):
            continue
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                entry.unlink()  # fails while it is open
                continue
            fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system lets a folder be synced."""
    if sys.platform == "win32":
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # one may be allowed to write to a folder, and not to read it
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # fsync alone stops at the drive's own cache there
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _sync_data(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _lock(fd: int) -> None:
    """Mark a temporary file as that of a living writer."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(fd, fcntl.LOCK_EX)


def _descriptor(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _link_descriptor(fd: int, name: Path) -> None:
    folder = os.open(name.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    try:  # dst_dir_fd makes Python call linkat, the only way to follow the descriptor's link
        os.link(_descriptor(fd), name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
