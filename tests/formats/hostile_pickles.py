"""Builders for files that no honest program writes: pickles opcode by opcode, zip files header by header."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from sdformats.pickle import open_pickle

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sdformats.errors import FormatError

FLOATS = struct.Struct("<6f").pack(0, 1, 2, 3, 4, 5)
"""Twenty-four bytes for a storage of six float32."""
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
V2 = ("torch._utils", "_rebuild_tensor_v2")
V3 = ("torch._utils", "_rebuild_tensor_v3")


class Raw(bytes):
    """Opcodes, to stand where a value would."""

    __slots__ = ()


def name(module: str, attribute: str) -> Raw:
    return Raw(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def stack_name(module: str, attribute: str) -> Raw:
    return Raw(dump(module) + dump(attribute) + b"\x93")


def dump(value: Any) -> bytes:
    """Opcodes that put a plain value on the stack, without memo and header."""
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if 0 <= value < 256:
            return b"K" + bytes([value])
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(dump, value)) + b"t"
        case list():
            return b"](" + b"".join(map(dump, value)) + b"e"
        case dict():
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def program(value: Any, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return bytes([0x80, protocol]) + dump(value) + b"."


def call(function: Raw, *arguments: Any) -> Raw:
    return Raw(function + dump(arguments) + b"R")


def new(kind: Raw, *arguments: Any) -> Raw:
    return Raw(kind + dump(arguments) + b"\x81")


def build(thing: Any, state: Any) -> Raw:
    return Raw(dump(thing) + dump(state) + b"b")


def storage(key: Any = "0", count: Any = 6, kind: Raw | None = None, *more: Any) -> Raw:
    kind = name("torch", "FloatStorage") if kind is None else kind
    return Raw(dump(("storage", kind, key, "cpu", count, *more)) + b"Q")


def tensor(
    shape: Any = (6,), stride: Any = (1,), offset: Any = 0, held: Raw | None = None, *more: Any, function: Any = V2
) -> Raw:
    """A tensor; with what is held left out it takes six floats from the record 0."""
    held = storage() if held is None else held
    hooks = call(name("collections", "OrderedDict"))
    return call(name(*function), held, offset, shape, stride, False, hooks, *more)


@dataclass
class Zipped:
    """One member; `local` and `central` override what its two headers say."""

    name: str
    data: bytes
    deflate: bool = False
    crc: int | None = None
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)


def build_zip(members: Iterable[Zipped], front: bytes = b"", *, zip64: bool = False, comment: bytes = b"") -> bytes:
    out = bytearray(front)
    directory = b""
    count = 0
    for member in members:
        packed = member.data
        if member.deflate:
            machine = zlib.compressobj(9, wbits=-15)
            packed = machine.compress(member.data) + machine.flush()
        base = {
            "name": member.name.encode(),
            "flags": 0x800,
            "method": 8 if member.deflate else 0,
            "crc": zlib.crc32(member.data) if member.crc is None else member.crc,
            "packed": len(packed),
            "size": len(member.data),
            "header": len(out),
            "extra": b"",
            "disk": 0,
            "attributes": 0,
        }
        own, told = base | member.local, base | member.central
        out += _local(own) + packed
        directory += _central(told)
        count += 1
    begin = len(out)
    out += directory
    if zip64:
        record = len(out)
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), begin)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, record, 1)
        out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, len(comment))
    else:
        out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), begin, len(comment))
    return bytes(out + comment)


def _local(said: dict[str, Any]) -> bytes:
    sizes = (said["crc"], said["packed"], said["size"], len(said["name"]), len(said["extra"]))
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, said["flags"], said["method"], 0, 0, *sizes)
    return head + bytes(said["name"] + said["extra"])


def _central(said: dict[str, Any]) -> bytes:
    sizes = (said["crc"], said["packed"], said["size"], len(said["name"]), len(said["extra"]))
    head = struct.pack("<4s6H3I2H", b"PK\1\2", 20, 20, said["flags"], said["method"], 0, 0, *sizes)
    rest = struct.pack("<3H2I", 0, said["disk"], 0, said["attributes"], said["header"])
    return head + rest + bytes(said["name"] + said["extra"])


def torch_members(
    value: Any, records: dict[str, bytes] | None = None, *, root: str = "archive/", **more: Any
) -> list[Zipped]:
    """What ``torch.save`` puts into a zip file, for a pickle made by hand. `more` goes to the records."""
    records = {"0": FLOATS} if records is None else records
    pickle = value if isinstance(value, bytes) and not isinstance(value, Raw) else program(value)
    members = [Zipped(f"{root}data.pkl", pickle)]
    members += [Zipped(f"{root}data/{key}", data, **more) for key, data in records.items()]
    return [*members, Zipped(f"{root}version", b"3\n")]


def write_zip(path: Path, value: Any, records: dict[str, bytes] | None = None, **more: Any) -> Path:
    """Write a torch zip file around a pickle made by hand (a value, or the bytes of a whole pickle)."""
    path.write_bytes(build_zip(torch_members(value, records, **more)))
    return path


def legacy(value: Any, keys: Any, *storages: tuple[int, bytes], little: bool = True, version: int = 1001) -> bytes:
    """A file in torch's old format: each storage as (number of elements said, bytes)."""
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2}}
    parts = [MAGIC, program(version), program(system), program(value), program(keys)]
    return b"".join(parts) + b"".join(struct.pack("<q", count) + data for count, data in storages)


def assert_refused(path: Path, kind: type[FormatError], match: str | None = None, *, read: bool = False) -> None:
    """Assert that a file is refused with one line that names it."""

    def check_attempt() -> None:
        with open_pickle(path) as source:
            if read:
                for name in source.specs:
                    source.read(name)
                source.verify()

    with pytest.raises(kind, match=match) as caught:
        check_attempt()
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.isprintable()
    assert len(text) < 700


def assert_refused_value(tmp_path: Path, value: Any, kind: type[FormatError], match: str, **more: Any) -> None:
    assert_refused(write_zip(tmp_path / "x.pt", value, **more), kind, match)
