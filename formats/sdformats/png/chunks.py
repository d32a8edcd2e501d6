"""PNG's chunks: length, kind, data, checksum; and the texts in them.

The lengths of all chunks are checked first; the data and checksum of a chunk when it is asked for.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdformats.place import Place
    from sdformats.positional import InputFile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 32 << 20
"""Longest text in bytes, packed or not."""
_MAX_CHUNKS = 1 << 16
_LONGEST_KEYWORD = 79
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_FRAME = 12
"""Bytes of a chunk that are not its data."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: its kind, and where its data is."""

    kind: bytes
    start: int
    size: int


class Chunks:
    """A PNG file as a list of chunks.

    Args:
        file: begins with PNG's signature.
        place: for errors.

    Raises:
        CorruptFile: the file ends within a chunk.
        UnsafeFile: there are too many.
    """

    def __init__(self, file: InputFile, place: Place) -> None:
        self._file = file
        self._place = place
        self.all = tuple(self._listed())

    def _listed(self) -> Iterator[Chunk]:
        at, kind, count = len(SIGNATURE), b"", 0
        while kind != b"IEND":
            if at + _FRAME > self._file.size:
                raise self._place.corrupt("ends before its last chunk", advice="download or copy it again")
            size, kind = struct.unpack(">I4s", self._file.read(at, 8))
            if at + _FRAME + size > self._file.size:
                shown = kind.decode("latin1")
                raise self._place.corrupt(f"ends within its chunk {shown!r}", advice="download or copy it again")
            count += 1
            if count > _MAX_CHUNKS:
                raise self._place.unsafe(f"has more than {_MAX_CHUNKS:,} chunks")
            yield Chunk(kind, at + 8, size)
            at += _FRAME + size

    def data(self, chunk: Chunk) -> bytes:
        """Return a chunk's data, checked.

        Raises:
            CorruptFile: its checksum is another.
        """
        data = self._file.read(chunk.start, chunk.size)
        (crc,) = struct.unpack(">I", self._file.read(chunk.start + chunk.size, 4))
        if zlib.crc32(data, zlib.crc32(chunk.kind)) != crc:
            kind = chunk.kind.decode("latin1")
            raise self._place.corrupt(f"has a wrong checksum in its chunk {kind!r}", advice="download or copy it again")
        return data

    def text(self, keyword: bytes) -> bytes | None:
        """Return the text under a keyword, however it is stored; None where there is none.

        Raises:
            CorruptFile: its chunk is malformed.
            UnsafeFile: it is longer than `MAX_TEXT`, or grows to more.
        """
        for chunk in self.all:
            if chunk.kind in _TEXTS and chunk.size > len(keyword):
                if self._file.read(chunk.start, len(keyword) + 1) != keyword + b"\0":
                    continue
                if chunk.size > MAX_TEXT:
                    raise self._place.unsafe(f"has a text of {chunk.size:,} bytes", f"at most {MAX_TEXT:,}")
                return self._text(chunk.kind, self.data(chunk)[len(keyword) + 1 :])
        return None

    def _text(self, kind: bytes, rest: bytes) -> bytes:
        if kind == b"tEXt":
            return rest
        if kind == b"zTXt":
            packed, method, data = True, rest[:1], rest[1:]
        else:
            fields = rest[2:].split(b"\0", 2)
            if len(rest) < 2 or len(fields) < 3:
                raise self._place.corrupt("has a malformed text chunk")
            packed, method, data = rest[0] == 1, rest[1:2], fields[2]
        if not packed:
            return data
        if method != b"\0":
            raise self._place.corrupt("has a text that is packed in an unknown way", "zlib")
        return inflated(data, MAX_TEXT, self._place, "a text")


def inflated(data: bytes, limit: int, place: Place, what: str, *, padded: bool = False) -> bytes:
    """Unpack what zlib packed.

    Args:
        data: the packed bytes.
        limit: bytes that it may grow to.
        place: for errors.
        what: how to call it in them.
        padded: whether anything may follow the packed bytes.

    Raises:
        CorruptFile: it is no whole zlib stream.
        UnsafeFile: it grows beyond the limit.
    """
    machine = zlib.decompressobj()
    try:
        found = machine.decompress(data, limit + 1)
    except zlib.error as error:
        raise place.corrupt(f"has {what} that cannot be unpacked", "a zlib stream") from error
    if len(found) > limit:
        raise place.unsafe(f"has {what} that grows to more than {limit:,} bytes")
    if not machine.eof or (machine.unused_data and not padded):
        raise place.corrupt(f"has {what} that cannot be unpacked", "one whole zlib stream")
    return found
