"""Direct writes leave the bytes that plain ones do, whatever the pieces, their order and the threads."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdformats import direct
from sdformats.direct import DirectWriter
from tests.formats.output_ways import failing

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 3 * 4096


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "CHUNK", CHUNK)
    monkeypatch.setattr(direct, "CHUNKS", 3)
    monkeypatch.setattr(direct, "LEAST", 0)


class Output:
    """A file, its writer, and what should be in it."""

    def __init__(self, size: int) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this
        os.truncate(self.file.fileno(), size)
        writer = DirectWriter.of(self.file.fileno(), size)
        if writer is None:
            pytest.skip("the file system has no direct writes")
        self.writer = writer
        self.want = bytearray(size)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.cancel()
        self.file.close()

    def write(self, start: int, data: bytes) -> None:
        self.want[start : start + len(data)] = data
        self.writer.write(start, memoryview(data))

    def got(self) -> bytes:
        return os.pread(self.file.fileno(), len(self.want) + 1, 0)


@given(
    st.integers(1, 5 * CHUNK), st.integers(1, 3 * CHUNK), st.sampled_from(["in order", "mixed"]), st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_pieces_from_several_threads(size: int, piece: int, order: str, seed: int) -> None:
    """More chunks are open at once than there is memory for, where pieces come in any order."""
    data = random.Random(seed).randbytes(size)
    starts = list(range(0, size, max(piece, size // 50)))
    with Output(size) as output:
        pieces = list(zip(starts, [*starts[1:], size], strict=True))
        if order == "mixed":
            random.Random(seed).shuffle(pieces)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda ends: output.writer.write(ends[0], memoryview(data)[slice(*ends)]), pieces))
        output.writer.finish()
        assert output.got() == data


@given(
    st.lists(st.tuples(st.integers(0, 4 * CHUNK - 1), st.integers(1, 2 * CHUNK)), min_size=1, max_size=30), st.data()
)
@settings(max_examples=60, deadline=None)
def test_the_later_of_two_pieces_stays(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    with Output(4 * CHUNK) as output:
        for number, (start, length) in enumerate(pieces):
            output.write(start, bytes([number + 1]) * min(length, 4 * CHUNK - start))
            if data.draw(st.integers(0, 9)) == 0:
                output.writer.drain()
                assert output.got() == output.want
        output.writer.finish()
        assert output.got() == output.want


def test_pages_go_directly_and_ends_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def watched(fd: int, data: memoryview, offset: int) -> int:
        seen.append((fd == output.writer._direct, offset, len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    with Output(2 * CHUNK + 5000) as output:
        output.write(0, bytes(range(256)) * 96 + bytes(5000))
        output.write(100, b"again")
        output.writer.finish()
        assert output.got() == output.want
    whole = {(True, 0, CHUNK), (True, CHUNK, CHUNK), (True, 2 * CHUNK, 4096)}
    assert set(seen) == whole | {(False, 2 * CHUNK + 4096, 904), (False, 100, 5)}


def test_a_file_system_that_refuses_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def refusing(fd: int, data: memoryview, offset: int) -> int:
        if fd == output.writer._direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    with Output(3 * CHUNK) as output:
        output.write(0, b"x" * 3 * CHUNK)
        output.writer.finish()
        assert output.got() == output.want


def test_a_fault_reaches_whoever_writes_and_whoever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with Output(9 * CHUNK) as output:
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            output.writer.write(0, memoryview(bytes(9 * CHUNK)))
        with pytest.raises(OSError, match="No space"):
            output.writer.finish()


def test_who_waits_for_memory_is_sent_away_when_the_output_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    going, go = threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        going.set()
        assert go.wait(60)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    with Output(9 * CHUNK) as output, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(output.writer.write, 0, memoryview(bytes(9 * CHUNK)))
        assert going.wait(60)
        output.writer.cancel()
        with pytest.raises(OSError, match="given up"):
            waiting.result(60)
        go.set()


def test_small_outputs_and_other_systems_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "o").open("wb") as file:
        monkeypatch.setattr(direct, "LEAST", 10)
        assert DirectWriter.of(file.fileno(), 9) is None
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        assert DirectWriter.of(file.fileno(), 10) is None
