"""Pictures from strangers: broken, cut off, or made to cost memory. Each is one clean error."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdformats.errors import CorruptFile, FormatError, UnknownFormat, UnsafeFile, UnsupportedFile
from sdformats.files import open_source
from sdformats.png import tensors
from tests.formats.png.pictures import SIGNATURE, as_json, base64_of, chunk, saved, with_chunks, with_strips, with_text

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.tensor import TensorSource

    Kind = type[FormatError]


def opened(path: Path, data: bytes) -> TensorSource:
    path.write_bytes(data)
    return open_source(path)


def embedding(vectors: Any) -> bytes:
    return with_text(base64_of({"string_to_param": {"*": {"TORCHTENSOR": vectors}}}))


GOOD = with_text(base64_of(as_json(np.ones((2, 8), np.float32))))


def test_cut_anywhere(tmp_path: Path) -> None:
    for end in range(len(GOOD)):
        (tmp_path / "e.png").write_bytes(GOOD[:end])
        with pytest.raises((CorruptFile, UnknownFormat)) as caught:
            open_source(tmp_path / "e.png")
        assert "bug" not in str(caught.value)


def test_any_bit_of_the_text_that_flips_is_found(tmp_path: Path) -> None:
    start = GOOD.index(b"tEXt")
    for at in range(start + 20, start + 60):
        broken = bytearray(GOOD)
        broken[at] ^= 4
        with pytest.raises(CorruptFile, match="wrong checksum in its chunk 'tEXt'"):
            opened(tmp_path / "e.png", bytes(broken))


def test_a_wrong_checksum_of_pixels(tmp_path: Path) -> None:
    data = bytearray(saved(with_strips(np.full((24, 8, 3), 99, np.uint8), zlib.compress(b"{}"))))
    data[data.index(b"IDAT") + 10] ^= 1
    with pytest.raises(CorruptFile, match="wrong checksum in its chunk 'IDAT'"):
        opened(tmp_path / "e.png", bytes(data))


BOMB = zlib.compress(bytes(64 << 20))


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        (with_chunks(chunk(b"zTXt", b"sd-ti-embedding\0\0" + BOMB)), UnsafeFile, "a text that grows to more than"),
        (with_chunks(chunk(b"iTXt", b"sd-ti-embedding\0\1\0\0\0" + BOMB)), UnsafeFile, "a text that grows to"),
        (with_chunks(chunk(b"zTXt", b"sd-ti-embedding\0\0nonsense")), CorruptFile, "a text that cannot be unpacked"),
        (with_chunks(chunk(b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(b"x")[:-3])), CorruptFile, "cannot be unp"),
        (with_chunks(chunk(b"zTXt", b"sd-ti-embedding\0\7" + BOMB)), CorruptFile, "packed in an unknown way"),
        (with_chunks(chunk(b"iTXt", b"sd-ti-embedding\0\1\0")), CorruptFile, "malformed text"),
        (with_chunks(chunk(b"iTXt", b"sd-ti-embedding\0")), CorruptFile, "malformed text"),
        (with_text(b"not base64!"), CorruptFile, "no base64"),
        (with_text(base64_of(b"{")), CorruptFile, "no JSON"),
        (with_text(base64_of(b"\xff\xfe\xfd")), CorruptFile, "no JSON"),
        (with_text(base64_of(b'{"a": 1e999, "b": ')), CorruptFile, "no JSON"),
        (with_text(base64_of([1])), CorruptFile, "JSON without names"),
        (with_text(base64_of({})), CorruptFile, "an embedding without tensors"),
        (with_text(base64_of(b"[" * 50_000 + b"]" * 50_000)), UnsafeFile, "nested too deeply"),
        (with_text(base64_of(b'{"a":' * 40 + b"1" + b"}" * 40)), UnsafeFile, "nested too deeply"),
        (with_text(base64_of(b"[" + b"[]," * 70_000 + b"1]")), UnsafeFile, "70,001 lists"),
        (embedding([[1, 2], [3]]), CorruptFile, "rows of different lengths"),
        (embedding([[1, 2], 3]), CorruptFile, "numbers and lists side by side"),
        (embedding([[[1]], [[2]]]), CorruptFile, "tensor that is nested too deeply"),
        (embedding([[1, "2"]]), CorruptFile, "something that is no number"),
        (embedding([[True, None]]), CorruptFile, "something that is no number"),
        (embedding({"a": 1}), CorruptFile, "something that is no number"),
        (embedding([[1e39]]), CorruptFile, "too large for float32"),
        (embedding([[10**400]]), CorruptFile, "beyond all floats"),
        (with_text(base64_of(b'{"x": {"TORCHTENSOR": [' + b"9" * 5000 + b"]}}")), CorruptFile, "no JSON"),
        (SIGNATURE + chunk(b"IEND", b""), CorruptFile, "no PNG header"),
        (SIGNATURE + chunk(b"tIME", b"") * 70_000, UnsafeFile, "more than 65,536 chunks"),
        (SIGNATURE + struct.pack(">I4s", 0xFFFFFFFF, b"IHDR") + bytes(99), CorruptFile, "ends within its chunk 'IHDR'"),
        (b"\x89PNG\n" + bytes(99), UnknownFormat, "PNG"),
    ],
    ids=range(29),
)
def test_refused(tmp_path: Path, data: bytes, kind: Kind, match: str) -> None:
    with pytest.raises(kind, match=match):
        opened(tmp_path / "e.png", data)


def test_a_text_may_not_be_larger_than_any_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_JSON", 100)
    with pytest.raises(UnsafeFile, match="at most 100"):
        opened(tmp_path / "e.png", GOOD)


def sized(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlaced)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        (sized(100_000, 100_000, b""), UnsafeFile, "picture of 100,000 x 100,000"),
        (sized(2, 2, bytes(1 << 20)), UnsafeFile, "pixels that grows to more than 14 bytes"),
        (sized(2, 2, bytes(13)), CorruptFile, "has 13 bytes of pixels"),
        (sized(0, 2, b""), CorruptFile, "malformed PNG header"),
        (sized(2, 2, b"\5" + bytes(13)), CorruptFile, "unknown way"),
        (sized(2, 2, bytes(14)), UnsupportedFile, "without an embedding"),
        (sized(2, 2, bytes(14), depth=16), UnsupportedFile, "without an embedding"),
        (sized(2, 2, bytes(14), colour=3), UnsupportedFile, "without an embedding"),
        (sized(2, 2, bytes(14), interlaced=1), UnsupportedFile, "without an embedding"),
        (saved(np.full((30, 40, 3), 200, np.uint8)), UnsupportedFile, "without an embedding"),
    ],
    ids=range(10),
)
def test_pixels_that_are_refused(tmp_path: Path, data: bytes, kind: Kind, match: str) -> None:
    with pytest.raises(kind, match=match):
        opened(tmp_path / "e.png", data)


def test_strips_that_grow(tmp_path: Path) -> None:
    drawn = with_strips(np.full((256, 8, 3), 99, np.uint8), zlib.compress(bytes(17 << 20), 9))
    with pytest.raises(UnsafeFile, match="strips that grows to more than"):
        opened(tmp_path / "e.png", saved(drawn))


def test_strips_that_were_damaged(tmp_path: Path) -> None:
    drawn = with_strips(np.full((64, 8, 3), 99, np.uint8), zlib.compress(json.dumps(list(range(300))).encode(), 9))
    drawn[20:30, :2] ^= 5
    with pytest.raises(CorruptFile, match="strips that cannot be unpacked"):
        opened(tmp_path / "e.png", saved(drawn))


def test_whitespace_in_base64_is_refused_too(tmp_path: Path) -> None:
    """Python's decoder would skip what is no base64, and give other bytes than a strict one."""
    good = base64.b64encode(as_json(np.ones((1, 4), np.float32)))
    with pytest.raises(CorruptFile, match="no base64"):
        opened(tmp_path / "e.png", with_text(good[:8] + b"?" + good[8:]))
