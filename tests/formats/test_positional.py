"""Reading and writing at offsets: changes are told, short calls are continued, every system call has a fallback."""

from __future__ import annotations

import errno
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdformats.errors import ChangedFile, FormatError
from sdformats.positional import Identity, InputFile, OutputHandle, open_exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT = random.Random(1).randbytes(100_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "input"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["preadv", "seek and read"])
def opened(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[InputFile]:
    if request.param == "seek and read":  # as on Windows
        monkeypatch.delattr(os, "preadv")
    file = InputFile(path)
    yield file
    file.close()


def test_reading(opened: InputFile, path: Path) -> None:
    assert opened.path == path
    assert opened.size == len(CONTENT)
    assert opened.read(0, 5) == CONTENT[:5]
    assert opened.read(99_990, 10) == CONTENT[-10:]
    assert opened.read(7, 0) == b""
    assert opened.head(3) == CONTENT[:3]
    assert opened.head(200_000) == CONTENT
    buffer = bytearray(b"....")
    opened.read_into(11, memoryview(buffer)[1:3])
    assert buffer == b"." + CONTENT[11:13] + b"."


def test_threads_do_not_disturb_each_other(opened: InputFile) -> None:
    def right(offset: int) -> bool:
        return opened.read(offset, 777) == CONTENT[offset : offset + 777]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, random.Random(2).choices(range(99_000), k=2_000)))


def test_reading_past_the_end_is_told(opened: InputFile, path: Path) -> None:
    with pytest.raises(ChangedFile) as caught:
        opened.read(99_999, 2)
    assert str(caught.value) == (
        f"{path}: ends at byte 100,000, before the 2 bytes at 99,999 (expected 100,000 bytes, as when it was opened); "
        "the file was cut short while it was read"
    )
    os.truncate(path, 50)
    with pytest.raises(ChangedFile, match="ends at byte 50,"):
        opened.read(49, 2)
    assert opened.read(48, 2) == CONTENT[48:50]
    assert opened.size == len(CONTENT)


def test_reads_that_come_back_short_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:13]], offset))
    file = InputFile(path)
    assert file.read(5, 1_000) == CONTENT[5:1_005]
    file.close()


def test_a_failing_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    file = InputFile(path)
    with pytest.raises(FormatError, match=r"input: cannot be read: Input/output error$"):
        file.read(0, 1)
    file.close()


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none: cannot be read: No such file or directory$"):
        InputFile(tmp_path / "none")
    with pytest.raises(FormatError, match=r"cannot be read: Is a directory$"):
        InputFile(tmp_path)


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _rewrite(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_replace, "changed while it was being read; run again when it is still"),
        (_append, "changed while it was being read"),
        (_rewrite, "changed while it was being read"),
        (lambda path: os.truncate(path, 3), "changed while it was being read"),
        (lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns - 1)), "changed while it was being read"),
        (Path.unlink, "is gone: No such file or directory"),
    ],
    ids=["replaced", "grown", "rewritten", "cut", "touched", "removed"],
)
def test_every_change_is_seen(opened: InputFile, path: Path, change: Callable[[Path], None], words: str) -> None:
    opened.check_unchanged()
    change(path)
    with pytest.raises(ChangedFile, match=words):
        opened.check_unchanged()


def test_reading_and_linking_are_no_change(opened: InputFile, path: Path) -> None:
    opened.read(0, 100)
    path.with_name("link").hardlink_to(path)
    path.chmod(0o600)
    opened.check_unchanged()
    assert opened.identity == Identity.of(path.stat())


def test_closing_closes_every_handle(opened: InputFile) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda offset: opened.read(offset, 1), range(50)))
    handles = list(opened._opened)
    opened.close()
    opened.close()
    assert all(handle.closed for handle in handles)


@pytest.fixture(params=["pwrite", "seek and write"])
def handle(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OutputHandle]:
    if request.param == "seek and write":  # as on Windows
        monkeypatch.delattr(os, "pwrite")
    fd = open_exclusive(tmp_path / "output", 0o666)
    yield OutputHandle(fd)
    os.close(fd)


def test_writing_in_any_order_by_many_threads(handle: OutputHandle, tmp_path: Path) -> None:
    offsets = list(range(0, len(CONTENT), 333))
    random.Random(3).shuffle(offsets)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: handle.write(at, memoryview(CONTENT)[at : at + 333]), offsets))
    assert (tmp_path / "output").read_bytes() == CONTENT


@pytest.mark.parametrize("call", ["pwrite", "write"])
def test_writes_that_come_back_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    whole = getattr(os, call)
    if call == "write":
        monkeypatch.delattr(os, "pwrite")
    monkeypatch.setattr(os, call, lambda fd, data, *offset: whole(fd, data[:7], *offset))
    fd = open_exclusive(tmp_path / "output", 0o666)
    OutputHandle(fd).write(2, memoryview(CONTENT)[:100])
    os.close(fd)
    assert (tmp_path / "output").read_bytes() == b"\0\0" + CONTENT[:100]


def test_exclusive_means_new(path: Path) -> None:
    with pytest.raises(FileExistsError):
        open_exclusive(path, 0o666)
    assert path.read_bytes() == CONTENT
