"""Writing what ``torch.load`` reads.

::

    archive/data.pkl    the pickle: what there is, see `torch_pickle`
    archive/byteorder   "little"
    archive/data/0 …    one storage per tensor, its bytes at a multiple of 64, as torch aligns them
    archive/version     "3"
    the zip directory

Every member is stored, not packed, and zip64 fields stand where something lies past 4 GB. Zip wants a CRC of every member in
front of it and in the directory: it is put together from the CRCs of the blocks as they are written. (torch itself would be
content without one; zipfile, unzip and whoever checks for damage would not.) Nothing in the file depends on its name or on
the time.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdformats.crc import combine
from sdformats.errors import WriteError
from sdformats.output import PendingFile
from sdformats.pickle_stream import MAX_PICKLE
from sdformats.tensor import TensorSink
from sdformats.torch_pickle import Tree, flat, write_pickle
from sdformats.torchzip import END, END64, ENTRY, FULL16, FULL32, LOCAL, LOCATOR, STORED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.tensor import Spec

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
"""How files that torch writes are called."""
ALIGNMENT = 64
_ROOT = "archive/"
_UTF8 = 0x800
_FIRST_DAY = 0x21
"""The first of January 1980, the first day that zip knows."""
_PLAIN, _WIDE = 20, 45
"""Versions of the zip format: stored members; zip64."""
_PADDING = 0x4246
"""The kind of extra field that torch uses for padding: "FB"."""
_largest = FULL32
"""Sizes and offsets from here on stand in zip64 fields."""


class TorchZipSink(TensorSink):
    """A zip file as ``torch.save`` writes it: laid out from `specs` first, then filled in any order by any thread.

    ``torch.load(weights_only=True)`` of torch 1.6 and later reads it (2.3 and later where there are types that came later).

    Args:
        path: where the output will be. A symbolic link is written through.
        specs: every tensor that will be written.
        tree: what the file holds: plain data with `TensorNamed` where the tensors stand. By default a dict of all
            tensors by name.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputExists, WriteError: before anything is created.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], tree: Tree = None, *, overwrite: bool = False) -> None:
        self.path = path
        pickle, keys = write_pickle(flat(specs) if tree is None else tree, specs, path)
        if len(pickle) > MAX_PICKLE:
            raise WriteError(f"needs a pickle of {len(pickle):,} bytes", path=path, expected=f"at most {MAX_PICKLE:,}")
        plain = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
        self._members, self._directory_at = _laid_out(_sizes(plain, keys, specs))
        self._storages = {name: self._members[f"data/{key}"] for name, key in keys.items()}
        size = self._directory_at + len(_directory(self._members, self._directory_at))
        self._file = PendingFile(path, size, overwrite=overwrite)
        try:
            for name, data in plain.items():
                self._put(self._members[name], 0, memoryview(data))
        except BaseException:
            self._file.abort()
            raise

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSink.write`. Blocks that are written twice must be the same blocks."""
        self._put(self._storages[name], offset, buffer)

    def commit(self) -> None:
        """See `TensorSink.commit`.

        Raises:
            WriteError: also where a tensor was not written completely.
        """
        try:
            for name, member in self._storages.items():
                self._check_whole(name, member)
            for member in self._members.values():
                self._file.write(member.header, memoryview(member.local()))
            self._file.write(self._directory_at, memoryview(_directory(self._members, self._directory_at)))
        except BaseException:
            self._file.abort()
            raise
        self._file.commit()

    def abort(self) -> None:
        self._file.abort()

    def _put(self, member: _Member, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            member.blocks[offset] = (len(buffer), zlib.crc32(buffer))
            self._file.write(member.data + offset, buffer)

    def _check_whole(self, name: str, member: _Member) -> None:
        end = 0
        for offset, (length, _) in sorted(member.blocks.items()):
            if offset != end:
                break
            end += length
        if end != member.size or sum(length for length, _ in member.blocks.values()) != end:
            raise WriteError("was not written whole", path=self.path, key=name, expected=f"{member.size:,} bytes")


def zip_size(specs: Mapping[str, Spec], tree: Tree, path: Path) -> int:
    """Return how many bytes a file will have; errors as `TorchZipSink`."""
    pickle, keys = write_pickle(tree, specs, path)
    members, at = _laid_out(_sizes({"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}, keys, specs))
    return at + len(_directory(members, at))


def _sizes(plain: Mapping[str, bytes], keys: Mapping[str, str], specs: Mapping[str, Spec]) -> dict[str, int]:
    """Return every member's size, in the order of the file: the storages come before the version."""
    sizes = {name: len(data) for name, data in plain.items()}
    last = sizes.popitem()
    return {**sizes, **{f"data/{key}": specs[name].nbytes for name, key in keys.items()}, last[0]: last[1]}


@dataclass(slots=True)
class _Member:
    """One file inside the zip: its header at offset `header`, its bytes at offset `data`."""

    name: bytes
    size: int
    header: int
    data: int
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By offset: length and CRC-32 of what was written."""

    @property
    def crc(self) -> int:
        total = 0
        for _, (length, crc) in sorted(self.blocks.items()):
            total = combine(total, crc, length)
        return total

    @property
    def wide(self) -> bool:
        return self.size >= _largest

    def local(self) -> bytes:
        """Return the header in front of the bytes."""
        size = FULL32 if self.wide else self.size
        extra = _wide_field(self.size, self.size) if self.wide else b""
        room = self.data - self.header - LOCAL.size - len(self.name) - len(extra)
        extra += struct.pack("<2H", _PADDING, room - 4) + b"Z" * (room - 4)
        version = _WIDE if self.wide else _PLAIN
        fields = (version, _UTF8, STORED, 0, _FIRST_DAY, self.crc, size, size, len(self.name), len(extra))
        return LOCAL.pack(b"PK\x03\x04", *fields) + self.name + extra

    def entry(self) -> bytes:
        """Return the entry in the directory."""
        far = self.header >= _largest
        wide = (self.size, self.size) if self.wide else ()
        extra = _wide_field(*wide, *((self.header,) if far else ()))
        size = FULL32 if self.wide else self.size
        header = FULL32 if far else self.header
        version = _WIDE if extra else _PLAIN
        times = (0, _FIRST_DAY)
        fields = (version, version, _UTF8, STORED, *times, self.crc, size, size, len(self.name), len(extra))
        return ENTRY.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, header) + self.name + extra


def _wide_field(*values: int) -> bytes:
    """Return zip64's extra field."""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _laid_out(sizes: Mapping[str, int]) -> tuple[dict[str, _Member], int]:
    """Give every member its place. Returns them, and the offset behind the last."""
    members: dict[str, _Member] = {}
    end = 0
    for name, size in sizes.items():
        raw = (_ROOT + name).encode()
        least = end + LOCAL.size + len(raw) + (20 if size >= _largest else 0) + 4
        members[name] = _Member(raw, size, end, -(-least // ALIGNMENT) * ALIGNMENT)
        end = members[name].data + size
    return members, end


def _directory(members: Mapping[str, _Member], at: int) -> bytes:
    """Return the directory for offset `at`, and the records that say where it is."""
    entries = b"".join(member.entry() for member in members.values())
    count, size, end = len(members), len(entries), at + len(entries)
    records = b""
    if count >= FULL16 or size >= _largest or at >= _largest:
        records = END64.pack(b"PK\x06\x06", END64.size - 12, _WIDE, _WIDE, 0, 0, count, count, size, at)
        records += LOCATOR.pack(b"PK\x06\x07", 0, end, 1)
    counts = (min(count, FULL16),) * 2
    narrow = [FULL32 if value >= _largest else value for value in (size, at)]
    return entries + records + END.pack(b"PK\x05\x06", 0, 0, *counts, *narrow, 0)
