"""Zip files: those that others packed again, and those whose parts contradict each other."""

from __future__ import annotations

import os
import struct
import threading
import tracemalloc
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sdformats.errors import CorruptFile, FormatError, UnsafeFile
from sdformats.pickle import open_pickle
from tests.formats import hostile_pickles as h
from tests.formats.pickle_oracle import check, save

if TYPE_CHECKING:
    from pathlib import Path


class TestZips:
    def repack(self, path: Path, method: int) -> Path:
        packed = path.with_suffix(".zip")
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", method) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        return packed

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_packed_again_by_another_program(self, tmp_path: Path, method: int) -> None:
        values = {"a": torch.arange(50000.0), "b": torch.arange(12.0).reshape(3, 4).t(), "e": torch.zeros(0)}
        check(self.repack(save(values, tmp_path / "x.pt"), method), values)

    def test_any_root_and_none(self, tmp_path: Path) -> None:
        for root in ("", "my model/", "a/b/", "ünï/"):
            with open_pickle(h.write_zip(tmp_path / "x.pt", {"a": h.tensor()}, root=root)) as source:
                assert source.read("a") == h.FLOATS

    def test_zip64_sizes_where_they_are_not_needed(self, tmp_path: Path) -> None:
        members = h.torch_members({"a": h.tensor()})
        wide = struct.pack("<2H2Q", 1, 16, 24, 24)
        members[1].local = {"packed": 0xFFFFFFFF, "size": 0xFFFFFFFF, "extra": wide}
        members[1].central = {"packed": 0xFFFFFFFF, "size": 0xFFFFFFFF, "extra": b"\x09\0\x02\0zz" + wide}
        path = tmp_path / "x.pt"
        path.write_bytes(h.build_zip(members, zip64=True, comment=b"hello"))
        with open_pickle(path) as source:
            assert source.read("a") == h.FLOATS

    def test_no_crc_is_no_fault(self, tmp_path: Path) -> None:
        with open_pickle(h.write_zip(tmp_path / "x.pt", {"a": h.tensor()}, crc=0)) as source:
            assert source.read("a") == h.FLOATS
            source.verify()

    def test_big_endian_records_are_swapped(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        wide = {"0": np.arange(6, dtype=">f4").tobytes(), "1": np.array([1 + 2j, 3 - 4j], ">c8").tobytes()}
        value = {
            "a": h.tensor(),
            "t": h.tensor((2, 3), (1, 2)),
            "c": h.tensor((2,), (1,), 0, h.storage("1", 2, h.name("torch", "ComplexFloatStorage"))),
        }
        path.write_bytes(h.build_zip([*h.torch_members(value, wide), h.Zipped("archive/byteorder", b"big")]))
        with open_pickle(path) as source:
            assert source.read("a") == np.arange(6, dtype="<f4").tobytes()
            assert source.read("t") == np.array([[0, 2, 4], [1, 3, 5]], "<f4").tobytes()
            assert source.read("c") == np.array([1 + 2j, 3 - 4j], "<c8").tobytes()

    def test_a_wide_view_is_gathered_in_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import sdformats.strided

        monkeypatch.setattr(sdformats.strided, "_SPAN", 64)
        base = torch.arange(4000.0).reshape(10, 20, 20)
        values = {"sparse": base[::3, ::7, ::5], "corner": base[:, 0, 0], "turned": base.permute(2, 0, 1)[::9]}
        check(save(values, tmp_path / "x.pt"), values)


# Row 14: damage.
def test_damage_is_found_in_what_was_read(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    value = {
        "a": h.tensor((1 << 18,), (1,), 0, h.storage("0", 1 << 18)),
        "b": h.tensor((6,), (1,), 0, h.storage("1", 6)),
    }
    path = h.write_zip(tmp_path / "x.pt", value, {"0": data, "1": h.FLOATS})
    raw = bytearray(path.read_bytes())
    at = raw.index(data) + 1000
    raw[at] ^= 1
    path.write_bytes(raw)
    h.assert_refused(path, CorruptFile, "'archive/data/0': has the CRC", read=True)
    with open_pickle(path) as source:
        source.read("b")
        source.verify()
        part = memoryview(bytearray(16))
        source.read_into("a", 1 << 19, part)
        with pytest.raises(CorruptFile, match="has the CRC"):
            source.verify()


def test_damage_in_a_deflated_member_is_found_at_once(tmp_path: Path) -> None:
    path = h.write_zip(tmp_path / "x.pt", {"a": h.tensor()}, deflate=True, crc=1)
    with open_pickle(path) as source, pytest.raises(CorruptFile, match="has the CRC"):
        source.read("a")


@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/byteorder"])
def test_damage_in_what_says_how_to_read_is_found_when_opened(tmp_path: Path, member: str) -> None:
    members = [*h.torch_members({"a": h.tensor()}), h.Zipped("archive/byteorder", b"little")]
    for each in members:
        each.crc = 12345 if each.name == member else None
    path = tmp_path / "x.pt"
    path.write_bytes(h.build_zip(members))
    h.assert_refused(path, CorruptFile, f"'{member}': has the CRC")


def test_checksums_of_blocks_in_any_order_from_several_threads(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    held = h.storage("0", len(data), h.name("torch", "ByteStorage"))
    path = h.write_zip(tmp_path / "x.pt", {"a": h.tensor((len(data),), (1,), 0, held)}, {"0": data})
    blocks = [(at, min(65_537, len(data) - at)) for at in range(0, len(data), 65_537)]
    out = bytearray(len(data))
    with open_pickle(path) as source:

        def work(mine: list[tuple[int, int]]) -> None:
            for at, size in mine:
                source.read_into("a", at, memoryview(out)[at : at + size])

        threads = [threading.Thread(target=work, args=(blocks[i::3][::-1],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert out == data
        source.verify()
        source.read_into("a", 100, memoryview(bytearray(70_000)))  # over the border of two blocks
        source.verify()


# Rows 15 and 16: deflate.
def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    tracemalloc.start()
    long = b"\x80\x02" + b"N0" * (40 << 20) + b"N."
    path.write_bytes(h.build_zip([h.Zipped("archive/data.pkl", long, deflate=True)]))
    tracemalloc.reset_peak()
    h.assert_refused(path, UnsafeFile, "is 83,886,084 bytes long")
    held = h.storage("0", 100 << 20, h.name("torch", "ByteStorage"))
    big = {"0": bytes(100 << 20)}
    h.write_zip(path, {"a": h.tensor((4,), (1,), 0, held)}, big, deflate=True)
    del long, big
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    h.assert_refused(path, UnsafeFile, "grows to 104,857,600 bytes")
    assert tracemalloc.get_traced_memory()[1] - before < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("said", [10, 25, 1000])
def test_deflated_members_of_another_length(tmp_path: Path, said: int) -> None:
    members = h.torch_members(
        {"a": h.tensor((said,), (1,), 0, h.storage("0", said, h.name("torch", "ByteStorage")))}, deflate=True
    )
    members[1].local = members[1].central = {"size": said, "crc": 0}
    path = tmp_path / "x.pt"
    path.write_bytes(h.build_zip(members))
    with open_pickle(path) as source, pytest.raises(CorruptFile, match="does not decompress to"):
        source.read("a")


def test_deflated_garbage(tmp_path: Path) -> None:
    members = h.torch_members({"a": h.tensor()}, deflate=True)
    data = bytearray(h.build_zip(members))
    packed = zlib.compressobj(9, wbits=-15)
    stream = packed.compress(h.FLOATS) + packed.flush()
    at = data.index(stream)
    data[at : at + len(stream)] = b"\xff" * len(stream)
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    h.assert_refused(path, CorruptFile, "cannot be decompressed", read=True)


# Rows 16 to 18: the zip directory.
def zip_file(tmp_path: Path, *more: h.Zipped, **changes: Any) -> Path:
    members = [*h.torch_members({"a": h.tensor()}), *more]
    for side, values in changes.items():
        setattr(members[1], side, values)
    path = tmp_path / "x.pt"
    path.write_bytes(h.build_zip(members))
    return path


def test_names_that_stand_twice_or_nearly(tmp_path: Path) -> None:
    h.assert_refused(zip_file(tmp_path, h.Zipped("archive/data/0", bytes(24))), UnsafeFile, "stands twice")
    h.assert_refused(zip_file(tmp_path, h.Zipped("archive/DATA/0", bytes(24))), UnsafeFile, "only in case")
    h.assert_refused(zip_file(tmp_path, h.Zipped("archive/data/0\0", bytes(24))), CorruptFile, "empty, cut")
    h.assert_refused(zip_file(tmp_path, h.Zipped("", bytes(24))), CorruptFile, "empty, cut")
    h.assert_refused(zip_file(tmp_path, h.Zipped("x" * 5000, b"")), CorruptFile, "overlong")
    h.assert_refused(
        zip_file(tmp_path, h.Zipped("other/data.pkl", b"\x80\x02}.")), UnsafeFile, "2 members named data.pkl"
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"local": {"name": b"archive/data/1"}}, "another name"),
        ({"local": {"name": b"archive/data/00"}}, "another name"),
        ({"local": {"method": 8}}, "another method"),
        ({"local": {"size": 23}}, "another size or CRC"),
        ({"local": {"packed": 23}}, "another size or CRC"),
        ({"local": {"crc": 1}}, "another size or CRC"),
        ({"local": {"crc": 0, "size": 0, "packed": 0}}, "another size or CRC"),
        ({"local": {"flags": 0x808}}, "another method"),
        ({"local": {"flags": 0x801}}, "another method"),
        ({"central": {"size": 23}}, "another size or CRC"),
        ({"central": {"size": 23}, "local": {"size": 23}}, "as it is not packed"),
        ({"central": {"packed": 1 << 30}}, "lies outside the file"),
        ({"central": {"header": 1 << 30}}, "lies outside the file"),
        ({"central": {"header": 5}}, "has no header at byte 5|has another name|overlap"),
        ({"central": {"header": 0}}, "has another name"),
        ({"central": {"flags": 0x801}}, "is encrypted"),
        ({"central": {"disk": 1}}, "on another disk"),
        ({"central": {"attributes": 0x10}}, "marked as a folder"),
        ({"central": {"method": 12}}, "packed by zip method 12"),
        ({"central": {"method": 99}}, "packed by zip method 99"),
        ({"central": {"size": 0xFFFFFFFF}}, "lacks the zip64 sizes"),
        ({"central": {"size": 0xFFFFFFFF, "extra": b"\1\0\4\0abcd"}}, "lacks the zip64 sizes"),
        ({"central": {"size": 0xFFFFFFFF, "extra": b"\1\0\x08\0abcd"}}, "lacks the zip64 sizes"),
    ],
)
def test_headers_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = zip_file(tmp_path, **changes)
    h.assert_refused(path, FormatError, match)


def test_extra_fields_may_differ(tmp_path: Path) -> None:
    path = zip_file(tmp_path, local={"extra": b"FB\x02\0ZZ"}, central={"extra": b"x" * 60000})
    with open_pickle(path) as source:
        assert source.read("a") == h.FLOATS


def test_impossible_ratios(tmp_path: Path) -> None:
    members = h.torch_members({}, deflate=True)
    members[1].local = members[1].central = {"size": 1 << 24}
    path = tmp_path / "x.pt"
    path.write_bytes(h.build_zip(members))
    h.assert_refused(path, UnsafeFile, "claims 16,777,216 bytes from")


def test_overlapping_members(tmp_path: Path) -> None:
    inner = h.build_zip([h.Zipped("archive/data/1", h.FLOATS)])
    outer = h.torch_members(
        {"a": h.tensor((54,), (1,), 0, h.storage("0", len(inner), h.name("torch", "ByteStorage")))}, {"0": inner}
    )
    data = h.build_zip(outer)
    shared = h.Zipped("archive/data/1", b"", crc=zlib.crc32(h.FLOATS))
    shared.central = {"header": data.index(b"archive/data/1") - 30, "packed": 24, "size": 24}
    end = data.rindex(b"PK\5\6")
    entry = h._central(
        {"name": b"archive/data/1", "flags": 0x800, "method": 0, "extra": b"", "disk": 0, "attributes": 0}
        | {"crc": shared.crc}
        | shared.central
    )
    fields = list(struct.unpack("<4s4H2IH", data[end:]))
    fields[3] += 1
    fields[4] += 1
    fields[5] += len(entry)
    path = tmp_path / "x.pt"
    path.write_bytes(data[:end] + entry + struct.pack("<4s4H2IH", *fields))
    h.assert_refused(path, UnsafeFile, "overlap")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (1, 1, "one part of a zip"),
        (2, 1, "one part of a zip"),
        (3, 2, "one part of a zip"),
        (5, 10, "has a zip directory at"),
        (6, 10, "has a zip directory at"),
        (6, 0xFFFFFFFF, "no zip64 directory"),
        (7, 1, "no zip directory"),
    ],
)
def test_a_broken_end(tmp_path: Path, field: int, value: int, match: str) -> None:
    data = h.build_zip(h.torch_members({"a": h.tensor()}))
    fields = list(struct.unpack("<4s4H2IH", data[-22:]))
    fields[field] = value
    path = tmp_path / "x.pt"
    path.write_bytes(data[:-22] + struct.pack("<4s4H2IH", *fields))
    h.assert_refused(path, FormatError, match)


def test_counts_that_disagree(tmp_path: Path) -> None:
    data = h.build_zip(h.torch_members({"a": h.tensor()}))
    fields = list(struct.unpack("<4s4H2IH", data[-22:]))
    fields[3] = fields[4] = 9
    path = tmp_path / "x.pt"
    path.write_bytes(data[:-22] + struct.pack("<4s4H2IH", *fields))
    h.assert_refused(path, CorruptFile, "has 3 members")


@pytest.mark.parametrize(
    ("at", "data", "match"),
    [(-42, b"PK\6\7\1", "broken zip64 locator"), (-34, b"\xff" * 8, "broken zip64 locator"), (-26, b"\7", "broken zip64 locator"),
     (-98, b"PK\6\5", "broken zip64 directory"), (-94, b"\0", "broken zip64 directory"), (-74, b"\7", "broken zip64 directory"),
     (-12, b"\7", "one part|two zip directories"), (-6, b"\7\0\0\0", "two zip directories")],
)  # fmt: skip
def test_a_broken_zip64_end(tmp_path: Path, at: int, data: bytes, match: str) -> None:
    raw = bytearray(h.build_zip(h.torch_members({"a": h.tensor()}), zip64=True))
    raw[at : at + len(data)] = data
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    h.assert_refused(path, FormatError, match)


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdformats.torchzip

    monkeypatch.setattr(sdformats.torchzip, "_MAX_MEMBERS", 2)
    h.assert_refused(zip_file(tmp_path), UnsafeFile, "too many zip members")
    monkeypatch.setattr(sdformats.torchzip, "_MAX_DIRECTORY", 100)
    h.assert_refused(zip_file(tmp_path), UnsafeFile, "a zip directory of")


def test_a_byte_order_that_is_none(tmp_path: Path) -> None:
    for order in (b"middle", b"", b"little\n", b"x" * 1000):
        h.assert_refused(
            zip_file(tmp_path, h.Zipped("archive/byteorder", order)), CorruptFile, "says|is 1,000 bytes long"
        )
