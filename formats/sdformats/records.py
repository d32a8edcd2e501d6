"""Runs of bytes that tensors lie in: a part of a file, a deflated zip member, or bytes that are in memory already.

A record is read at offsets by several threads at once. One that comes with a CRC remembers the CRCs of the blocks that
were read, so that `Record.verify` can say whether all of it was right without reading it a second time.
"""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.crc import combine
from sdformats.errors import ChangedFile, CorruptFile

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from pathlib import Path

    from sdformats.positional import InputFile

_CHUNK = 1 << 20


class Record(ABC):
    """Bytes with a length and a place in a file."""

    size: int
    """Length in bytes."""
    position: int
    """Offset in the file, for reading in order."""
    resident = False
    """Whether the bytes are in memory, so that a part of them costs nothing to take."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the record on. The caller has checked the range."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from byte `offset` on."""
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def verify(self) -> None:  # noqa: B027 - most records have nothing to verify
        """Check the CRC, if there is one and anything was read.

        Raises:
            CorruptFile: the CRC is another.
        """


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a record: `size` bytes from byte `start` on."""

    record: Record
    start: int
    size: int

    @property
    def position(self) -> int:
        """Offset in the file."""
        return self.record.position + (0 if self.record.resident else self.start)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the span."""
        return self.record.read(self.start + offset, size)

    def part(self, offset: int, size: int) -> Span:
        """Return a part of this span."""
        return Span(self.record, self.start + offset, size)


class MemoryRecord(Record):
    """Bytes that are in memory already (they stood inside a pickle)."""

    resident = True

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.size = len(data)
        self.position = position

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self._data)[offset : offset + len(buffer)]


class StoredRecord(Record):
    """A run of bytes in a file, exactly as it is.

    Args:
        file: the file.
        start: offset of the first byte.
        size: length in bytes.
        crc: CRC-32 of all bytes, or 0 for none.
        name: how to call it in an error.
    """

    def __init__(self, file: InputFile, start: int, size: int, crc: int = 0, name: str | None = None) -> None:
        self._file = file
        self.position = start
        self.size = size
        self._crc = crc
        self._name = name
        self._blocks: dict[tuple[int, int], int] = {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.read_into(self.position + offset, buffer)
        if self._crc:
            crc = zlib.crc32(buffer)
            if self._blocks.setdefault((offset, len(buffer)), crc) != crc:
                raise self._changed()

    def verify(self) -> None:
        """See `Record.verify`. Reads what was never read, and reads again what was read in overlapping blocks."""
        if not self._blocks:
            return
        total, end = 0, 0
        for (offset, length), crc in sorted(self._blocks.items()):
            if offset < end:
                if self._crc_of_file(offset, offset + length) != crc:
                    raise self._changed()
                continue
            if offset > end:
                total = combine(total, self._crc_of_file(end, offset), offset - end)
            total = combine(total, crc, length)
            end = offset + length
        total = combine(total, self._crc_of_file(end, self.size), self.size - end)
        if total != self._crc:
            raise wrong_crc(self._file.path, self._name, self._crc, total)

    def _crc_of_file(self, begin: int, end: int) -> int:
        crc = 0
        buffer = memoryview(bytearray(min(_CHUNK, end - begin)))
        while begin < end:
            block = buffer[: min(_CHUNK, end - begin)]
            self._file.read_into(self.position + begin, block)
            crc = zlib.crc32(block, crc)
            begin += len(block)
        return crc

    def _changed(self) -> ChangedFile:
        return ChangedFile("gave other bytes when it was read again", path=self._file.path, key=self._name)


class DeflatedRecord(Record):
    """A deflated zip member. It is inflated whole when a part is asked for, and checked at once."""

    def __init__(
        self, file: InputFile, start: int, packed: int, size: int, crc: int, name: str, recent: Recent
    ) -> None:
        self._file = file
        self.position = start
        self._packed = packed
        self.size = size
        self._crc = crc
        self._name = name
        self._recent = recent

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Record.read_into`.

        Raises:
            CorruptFile: the member cannot be inflated, or its length or CRC is wrong.
        """
        data = self._recent.get(self, self._inflate)
        buffer[:] = memoryview(data)[offset : offset + len(buffer)]

    def _inflate(self) -> bytes:
        return inflate(self._file, self.position, self._packed, self.size, self._crc, self._name)


def inflate(file: InputFile, start: int, packed: int, size: int, crc: int, name: str) -> bytes:
    """Return the `size` bytes that the `packed` deflated bytes at `start` stand for; never inflates further than that.

    Raises:
        CorruptFile: the stream is broken, or its length or CRC is wrong.
    """
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    out = bytearray()
    end = start + packed
    try:
        while start < end and not machine.eof and len(out) <= size:
            data = file.read(start, min(_CHUNK, end - start))
            start += len(data)
            while data and not machine.eof and len(out) <= size:
                out += machine.decompress(data, size + 1 - len(out))
                data = machine.unconsumed_tail
    except zlib.error as error:
        raise CorruptFile("cannot be decompressed", path=file.path, key=name) from error
    if len(out) != size or not machine.eof or machine.unused_data or start != end:
        raise CorruptFile("does not decompress to what the zip directory says", path=file.path, key=name,
                          expected=f"{size:,} bytes from {packed:,}")  # fmt: skip
    found = zlib.crc32(out)
    if crc and found != crc:
        raise wrong_crc(file.path, name, crc, found)
    return bytes(out)


def wrong_crc(path: Path, name: str | None, expected: int, found: int) -> CorruptFile:
    """Return the error for bytes whose CRC is not what the file says."""
    return CorruptFile(
        f"has the CRC {found:08x}",
        path=path,
        key=name,
        expected=f"{expected:08x}",
        advice="the file was damaged: download or copy it again",
    )


class Recent:
    """Bytes that were costly to make (inflated, gathered), kept while they are likely to be asked for again.

    Args:
        budget: bytes kept in all; the newest is always kept.
    """

    def __init__(self, budget: int = 64 << 20) -> None:
        self._budget = budget
        self._kept: OrderedDict[Hashable, bytes | memoryview] = OrderedDict()
        self._held = 0
        self._lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """Return what is kept under `key`, or make it. Only one thread makes something at a time."""
        with self._lock:
            data = self._kept.get(key)
            if data is not None:
                self._kept.move_to_end(key)
                return data
            data = make()
            self._kept[key] = data
            self._held += len(data)
            while self._held > self._budget and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._held -= len(dropped)
            return data

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._held = 0
