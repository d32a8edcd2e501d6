"""The directory of a zip file, read strictly.

Zip says everything twice: in a header before each member and in the directory at the end. Readers that trust one and
readers that trust the other see different files, so here both must say the same. A member may not overlap another, a name
may stand only once, and the first member begins at byte 0: what was looked at is what will be read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sdformats.errors import CorruptFile, FormatError, UnsafeFile, UnsupportedFile

if TYPE_CHECKING:
    from sdformats.positional import InputFile

STORED, DEFLATED = 0, 8
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
_DIRECTORY = 0x10
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 1, 8, 0x800
_MAX_DIRECTORY, _MAX_MEMBERS, _LONGEST_NAME = 64 << 20, 100_000, 1024
_DEFLATE_RATIO = 1032
"""No deflate stream can grow by more than this factor."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside the zip: `packed` bytes at offset `data`, which stand for `size` bytes. A `crc` of 0 means none."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    data: int


@dataclass(frozen=True, slots=True)
class _Entry:
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def looks_like_zip(head: bytes) -> bool:
    """Whether a file that begins with these bytes (4 or more) is a zip file with at least one member."""
    return head[:4] == b"PK\x03\x04"


def read_directory(file: InputFile) -> dict[str, Member]:
    """Return every member by name, in the order of the directory.

    Raises:
        CorruptFile: the file is cut short, or directory and members contradict each other.
        UnsafeFile: members overlap, or claim impossible sizes.
        UnsupportedFile: a member is encrypted, or packed by something other than deflate.
    """
    begin, size, count = _find_directory(file)
    entries = _entries(file, file.read(begin, size), count)
    _check_names(file, [entry.raw_name for entry in entries])
    by_place = sorted(entries, key=lambda entry: entry.header)
    if by_place and by_place[0].header != 0:
        raise _unsafe(file, "has something else in front of its first member", "a member at byte 0")
    members = {entry.header: _member(file, entry, begin) for entry in by_place}
    for entry, following in pairwise(by_place):
        member = members[entry.header]
        if member.data + member.packed > following.header:
            raise _unsafe(file, f"has members that overlap at byte {following.header:,}", "each byte in one member")
    return {members[entry.header].name: members[entry.header] for entry in entries}


def _corrupt(file: InputFile, problem: str, expected: str | None = None, key: str | None = None) -> CorruptFile:
    return CorruptFile(problem, path=file.path, key=key, expected=expected)


def _unsafe(file: InputFile, problem: str, expected: str, key: str | None = None) -> UnsafeFile:
    return UnsafeFile(problem, path=file.path, key=key, expected=expected)


def _find_directory(file: InputFile) -> tuple[int, int, int]:
    """Return the directory's offset, length and number of entries."""
    reach = min(file.size, END.size + FULL16)
    tail = file.read(file.size - reach, reach)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + END.size > reach or at + END.size + END.unpack_from(tail, at)[7] != reach):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise CorruptFile(
            "has no zip directory at its end",
            path=file.path,
            advice="the file was cut short: download or copy it again",
        )
    end = file.size - reach + at
    _, disk, first_disk, here, count, size, begin, _ = END.unpack_from(tail, at)
    if disk not in (0, FULL16) or first_disk not in (0, FULL16) or here != count:
        raise UnsupportedFile("is one part of a zip file in several parts", path=file.path)
    wide = _find_zip64(file, end)
    if wide is not None:
        narrow = zip((count, size, begin), wide[1:], (FULL16, FULL32, FULL32), strict=True)
        if any(short not in (long, full) for short, long, full in narrow):
            raise _corrupt(file, "has two zip directories that disagree")
        end, count, size, begin = wide
    elif FULL32 in (size, begin):
        raise _corrupt(file, "has no zip64 directory", "one, as the file is over 4 GB")
    if begin + size != end:
        raise _corrupt(file, f"has a zip directory at {begin:,} + {size:,} bytes", f"its end at {end:,}")
    if size > _MAX_DIRECTORY:
        raise _unsafe(file, f"has a zip directory of {size:,} bytes", f"at most {_MAX_DIRECTORY:,}")
    return begin, size, count


def _find_zip64(file: InputFile, end: int) -> tuple[int, int, int, int] | None:
    """Return offset of the zip64 end record, and what it says: entries, length and offset of the directory."""
    if end < LOCATOR.size:
        return None
    at = end - LOCATOR.size
    mark, disk, record, disks = LOCATOR.unpack(file.read(at, LOCATOR.size))
    if mark != b"PK\x06\x07":
        return None
    if disk != 0 or disks > 1 or record + END64.size > at:
        raise _corrupt(file, "has a broken zip64 locator")
    mark, length, _, _, disk, first_disk, here, count, size, begin = END64.unpack(file.read(record, END64.size))
    if mark != b"PK\x06\x06" or record + 12 + length != at or disk or first_disk or here != count:
        raise _corrupt(file, "has a broken zip64 directory")
    return record, count, size, begin


def _entries(file: InputFile, raw: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    while at < len(raw):
        if at + ENTRY.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            raise _corrupt(file, f"has a broken zip directory at entry {len(entries)}")
        fields = ENTRY.unpack_from(raw, at)
        flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_end = at + ENTRY.size + fields[10]
        extra_end = name_end + fields[11]
        name = raw[at + ENTRY.size : name_end]
        at = extra_end + fields[12]
        if at > len(raw):
            raise _corrupt(file, f"has a broken zip directory at entry {len(entries)}")
        if fields[13] or (fields[15] & _DIRECTORY and size):
            # torch takes such a member for empty, and leaves the tensor as the memory happened to be.
            raise _unsafe(file, f"has zip entry {len(entries)} marked as a folder or on another disk", "plain members")
        size, packed, header = _wide(file, raw[name_end:extra_end], (size, packed, fields[16]))
        if len(entries) == _MAX_MEMBERS:
            raise _unsafe(file, "has too many zip members", f"at most {_MAX_MEMBERS:,}")
        entries.append(_Entry(name, flags, method, crc, packed, size, header))
    if len(entries) != count:
        raise _corrupt(file, f"has {len(entries):,} members in its zip directory", f"{count:,}, as it says")
    return entries


def _wide(file: InputFile, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """Replace the values that do not fit in 32 bits by those of the zip64 field, where they stand in the same order."""
    if FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            missing = values.count(FULL32)
            if length < 8 * missing or at + 4 + length > len(extra):
                break
            wide = iter(struct.unpack_from(f"<{missing}Q", extra, at + 4))
            return tuple(next(wide) if value == FULL32 else value for value in values)
        at += 4 + length
    raise _corrupt(file, "lacks the zip64 sizes of a member")


def _check_names(file: InputFile, names: list[bytes]) -> None:
    seen: dict[str, str] = {}
    for raw in names:
        name = _decode(raw)
        if not name or "\0" in name or len(raw) > _LONGEST_NAME:
            raise _corrupt(file, "has a zip member with an empty, cut or overlong name", key=name[:80])
        other = seen.setdefault(name.casefold(), name)
        if other is not name:
            problem = "stands twice in the zip directory" if other == name else f"differs from {other!r} only in case"
            raise _unsafe(file, problem, "each name once", key=name)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _member(file: InputFile, entry: _Entry, limit: int) -> Member:
    """Check an entry against the header in front of the member, and find where its bytes begin."""
    name = _decode(entry.raw_name)
    if entry.flags & _ENCRYPTED:
        raise UnsupportedFile("is encrypted", path=file.path, key=name, advice="unpack it with its password first")
    if entry.method not in (STORED, DEFLATED):
        raise UnsupportedFile(f"is packed by zip method {entry.method}", path=file.path, key=name,
                              expected="stored or deflated", advice="unpack it and zip it again")  # fmt: skip
    length = LOCAL.size + len(entry.raw_name)
    if entry.header + length > limit:
        raise _corrupt(file, "lies outside the file", key=name)
    raw = file.read(entry.header, length)
    mark, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack_from(raw)
    if mark != b"PK\x03\x04":
        raise _corrupt(file, f"has no header at byte {entry.header:,}", key=name)
    if name_length != len(entry.raw_name) or raw[LOCAL.size :] != entry.raw_name:
        raise _unsafe(file, "has another name in its own header", "the same name in both", key=name)
    if method != entry.method or (flags ^ entry.flags) & (_ENCRYPTED | _DESCRIPTOR):
        raise _unsafe(file, "has another method in its own header", "the same in both", key=name)
    data = entry.header + length + extra_length
    if data + entry.packed > limit:
        raise _corrupt(file, f"is {entry.packed:,} bytes long and lies outside the file", key=name)
    if FULL32 in (packed, size):
        size, packed = _wide(file, file.read(data - extra_length, extra_length), (size, packed))
    deferred = entry.flags & _DESCRIPTOR and crc == packed == size == 0
    if not deferred and (crc, packed, size) != (entry.crc, entry.packed, entry.size):
        raise _unsafe(file, "has another size or CRC in its own header", "the same in both", key=name)
    _check_size(file, entry, name)
    return Member(name, entry.method, entry.crc, entry.packed, entry.size, data)


def _check_size(file: InputFile, entry: _Entry, name: str) -> None:
    if entry.method == STORED and entry.packed != entry.size:
        raise _corrupt(file, f"takes {entry.packed:,} bytes", f"{entry.size:,}, as it is not packed", key=name)
    if entry.method == DEFLATED and entry.size > _DEFLATE_RATIO * entry.packed:
        raise _unsafe(file, f"claims {entry.size:,} bytes from {entry.packed:,}", "a possible size", key=name)


def explain_other_zip(file: InputFile, names: list[str]) -> FormatError:
    """Return the error for a zip file that holds no ``data.pkl``."""
    if any(name.endswith(".npy") for name in names):
        what = "is a numpy archive (.npz)"
    elif any(name.lower().endswith((".safetensors", ".ckpt", ".pt", ".bin", ".pth")) for name in names):
        return UnsupportedFile("is a zip file with model files in it", path=file.path, advice="unpack it first")
    else:
        what = "is a zip file, but none that torch.save writes"
    return UnsupportedFile(what, path=file.path, expected="a member named data.pkl")
