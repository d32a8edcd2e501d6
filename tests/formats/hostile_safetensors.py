"""Safetensors files built byte by byte, right and wrong: the material of the safetensors tests."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

Header = dict[str, Any] | str | bytes


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """Return one tensor's place in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def build(header: Header, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """Return a file: `header` as it is, or as JSON; `length` is what the file says of it."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def written(text: str, name: str = '"w"') -> str:
    """Return a header with one tensor, whose fields are spelled as in `text`."""
    return f"{{{name}:{{{text}}}}}"


@dataclass(frozen=True)
class Case:
    """A broken file, and the words by which the error must tell what is wrong."""

    name: str
    content: bytes
    says: str


_ONE = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'
_TWICE = f"{{{_ONE}}}"
_HUGE = "9" * 400
_BOMB = 200_000

DUPLICATES = [
    Case("same-name-twice", build(f'{{"w":{_TWICE},"w":{_TWICE}}}'), "'w': stands twice"),
    Case("same-name-escaped", build(f'{{"w":{_TWICE},"\\u0077":{_TWICE}}}'), "'w': stands twice"),
    Case("escaped-first", build(f'{{"\\u0077":{_TWICE},"w":{_TWICE}}}'), "'w': stands twice"),
    Case(
        "metadata-twice", build(f'{{"__metadata__":{{}},"w":{_TWICE},"__metadata__":{{}}}}'), "'__metadata__': stands"
    ),
    Case("metadata-escaped", build(f'{{"__metadata__":{{}},"w":{_TWICE},"__metadat\\u0061__":{{}}}}'), "stands twice"),
    Case("field-twice", build(written(f'"dtype":"I8",{_ONE}')), "'dtype': stands twice"),
    Case("offsets-twice", build(written(f'{_ONE},"data\\u005foffsets":[0,4]')), "'data_offsets': stands twice"),
    Case("metadata-key-twice", build(f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{_TWICE}}}'), "'a': stands twice"),
]

OFFSETS = [
    Case("hole-first", build({"w": entry(offsets=[1, 5])}, bytes(5)), "'w': leaves a hole of 1 bytes"),
    Case("hole-between", build({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10)), "'b': leaves a hole of 2"),
    Case("hole-last", build({"w": entry()}, bytes(9)), "has 5 bytes after its last tensor"),
    Case("overlap", build({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "'b': overlaps its neighbour by 2"),
    Case("same-place", build({"a": entry(), "b": entry()}), "overlaps its neighbour by 4"),
    Case("negative", build({"w": entry(offsets=[-4, 0])}), "malformed data_offsets"),
    Case("backwards", build({"w": entry(offsets=[4, 0])}), "has the offsets [4, 0]"),
    Case("float", build({"w": entry(offsets=[0.0, 4.0])}), "malformed data_offsets"),
    Case("float-exponent", build(written('"dtype":"U8","shape":[4],"data_offsets":[0,4e0]')), "malformed data_offsets"),
    Case("bool", build({"w": entry(shape=[1], offsets=[False, True])}, bytes(1)), "malformed data_offsets"),
    Case("null", build({"w": entry(offsets=[0, None])}), "malformed data_offsets"),
    Case("strings", build({"w": entry(offsets=["0", "4"])}), "malformed data_offsets"),
    Case("one", build({"w": entry(offsets=[4])}), "has the offsets [4]"),
    Case("three", build({"w": entry(offsets=[0, 4, 4])}), "has the offsets [0, 4, 4]"),
    Case("none", build({"w": entry(offsets=[])}), "has the offsets []"),
    Case("object", build({"w": entry(offsets={"0": 4})}), "malformed data_offsets"),
    Case("past-the-end", build({"w": entry(shape=[8], offsets=[0, 8])}), "is cut short"),
    Case("past-2^63", build({"w": entry(offsets=[2**63, 2**63 + 4])}), "malformed data_offsets"),
    Case("wraps-64-bits", build({"w": entry(offsets=[2**64, 2**64 + 4])}), "malformed data_offsets"),
    Case(
        "hundreds-of-digits",
        build(written(f'"dtype":"U8","shape":[4],"data_offsets":[0,{_HUGE}]')),
        "malformed data_off",
    ),
    Case(
        "thousands-of-digits",
        build(written(f'"dtype":"U8","shape":[{_HUGE * 20}],"data_offsets":[0,4]')),
        "not valid JSON",
    ),
]

SHAPES = [
    Case("too-few-bytes", build({"w": entry("F32", [2], [0, 4])}), "has 4 bytes for F32 [2] (expected 8)"),
    Case("too-many-bytes", build({"w": entry("U8", [3], [0, 4])}), "has 4 bytes for U8 [3] (expected 3)"),
    Case("half-a-byte", build({"w": entry("F4", [3], [0, 2])}, bytes(2)), "has 2 bytes for F4 [3] (expected 1.5)"),
    Case("six-bits", build({"w": entry("F6_E2M3", [2], [0, 2])}, bytes(2)), "(expected 1.5)"),
    Case("empty-with-bytes", build({"w": entry("F32", [0, 9], [0, 4])}), "has 4 bytes for F32 [0, 9] (expected 0)"),
    Case("numel-wraps-to-4", build({"w": entry("U8", [2**62, 4, 4, 2], [0, 4])}), "more elements than fit"),
    Case("numel-wraps-to-0", build({"w": entry("U8", [2**32, 2**32], [0, 0])}, b""), "more elements than fit"),
    Case("bits-overflow", build({"w": entry("F64", [2**61], [0, 4])}), "more elements than fit"),
    Case("negative-shape", build({"w": entry(shape=[-4])}), "malformed shape"),
    Case("two-negatives", build({"w": entry(shape=[-2, -2])}), "malformed shape"),
    Case("float-shape", build({"w": entry(shape=[4.0])}), "malformed shape"),
    Case("bool-shape", build({"w": entry(shape=[4, True])}), "malformed shape"),
    Case("null-shape", build({"w": entry(shape=None)}), "malformed shape"),
    Case("nested-shape", build({"w": entry(shape=[[4]])}), "malformed shape"),
    Case("number-shape", build({"w": entry(shape=4)}), "malformed shape"),
]

ENTRIES = [
    Case("unknown-dtype", build({"w": entry("F128")}), "has an unknown type: 'F128'"),
    Case("lower-case-dtype", build({"w": entry("u8")}), "has an unknown type: 'u8'"),
    Case("dtype-null", build({"w": entry(None)}), "has an unknown type that is no text"),  # type: ignore[arg-type]
    Case("dtype-list", build({"w": entry(["U8"])}), "has an unknown type that is no text"),  # type: ignore[arg-type]
    Case("no-dtype", build(written('"shape":[4],"data_offsets":[0,4]')), "malformed entry"),
    Case("no-shape", build(written('"dtype":"U8","data_offsets":[0,4]')), "malformed entry"),
    Case("no-offsets", build(written('"dtype":"U8","shape":[4]')), "malformed entry"),
    Case("a-field-more", build(written(f'{_ONE},"device":"cuda"')), "malformed entry"),
    Case("entry-null", build('{"w":null}', b""), "malformed entry"),
    Case("entry-list", build('{"w":["U8",[4],[0,4]]}'), "malformed entry"),
    Case("name-is-half-a-surrogate", build(written(_ONE, r'"\ud800"')), "is no valid name"),
]

METADATA = [
    Case("metadata-number", build({"__metadata__": {"a": 1}, "w": entry()}), "'__metadata__': has no string under 'a'"),
    Case("metadata-null-value", build({"__metadata__": {"a": None}, "w": entry()}), "has no string under 'a'"),
    Case("metadata-nested", build({"__metadata__": {"a": {"b": "c"}}, "w": entry()}), "has no string under 'a'"),
    Case("metadata-list", build({"__metadata__": [], "w": entry()}), "'__metadata__': is no object"),
    Case("metadata-string", build({"__metadata__": "x", "w": entry()}), "'__metadata__': is no object"),
    Case("metadata-tensor", build({"__metadata__": entry()}), "has no string under 'shape'"),
    Case("metadata-surrogate", build(r'{"__metadata__":{"a":"\udfff"}}', b""), "half a surrogate pair under 'a'"),
    Case("metadata-surrogate-key", build(r'{"__metadata__":{"\ud83d":"a"}}', b""), "half a surrogate pair"),
]

JSON = [
    Case("nothing", b"", "is 0 bytes long"),
    Case("two-bytes", b"{}", "is 2 bytes long"),
    Case("seven-bytes", bytes(7), "is 7 bytes long"),
    Case("no-header", bytes(8), "no JSON object"),
    Case("no-header-but-data", bytes(12), "no JSON object"),
    Case("header-is-a-list", build("[]", b""), "no JSON object"),
    Case("header-is-null", build("null", b""), "no JSON object"),
    Case("leading-space", build(" {}", b""), "no JSON object"),
    Case("byte-order-mark", build("\ufeff{}", b""), "no JSON object"),
    Case("utf-16", build("{}".encode("utf-16-le"), b""), "not valid JSON"),
    Case("bad-utf-8", build(b'{"\xff":{}}', b""), "not UTF-8 (byte 10)"),
    Case("overlong-utf-8", build(b'{"\xc0\xaf":{}}', b""), "not UTF-8"),
    Case("surrogate-in-utf-8", build('{"\ud800":{}}', b""), "not UTF-8"),
    Case("raw-control-character", build('{"a\nb":{}}', b""), "not valid JSON"),
    Case("unclosed", build(f'{{"w":{_TWICE}'), "not valid JSON"),
    Case("second-object", build(f'{{"w":{_TWICE}}}{{}}'), "not valid JSON"),
    Case("nul-padding", build(f'{{"w":{_TWICE}}}' + "\0" * 8), "not valid JSON"),
    Case("garbage-after-the-object", build(f'{{"w":{_TWICE}}}garbage'), "not valid JSON"),
    Case("trailing-comma", build(f'{{"w":{_TWICE},}}'), "not valid JSON"),
    Case("comment", build(f'{{/**/"w":{_TWICE}}}'), "not valid JSON"),
    Case("nan", build(written('"dtype":"U8","shape":[4],"data_offsets":[0,NaN]')), "NaN is no JSON"),
    Case("infinity", build(written('"dtype":"U8","shape":[Infinity],"data_offsets":[0,4]')), "Infinity is no JSON"),
    Case("minus-infinity", build(written('"dtype":"U8","shape":[-Infinity],"data_offsets":[0,4]')), "-Infinity is no"),
    Case("list-bomb", build('{"w":' + "[" * _BOMB, b""), "not valid JSON"),
    Case("closed-list-bomb", build('{"w":' + "[" * _BOMB + "]" * _BOMB + "}", b""), "not valid JSON"),
    Case("object-bomb", build('{"a":' * _BOMB, b""), "not valid JSON"),
    Case(
        "length-into-the-data",
        build(f'{{"w":{_TWICE}}}', b"12345678", length=len(f'{{"w":{_TWICE}}}') + 8),
        "not valid",
    ),
    Case("length-too-short", build(f'{{"w":{_TWICE}}}', length=20), "not valid JSON"),
    Case("length-past-the-end", build(f'{{"w":{_TWICE}}}', b"", length=200), "ends within its header of 200 bytes"),
    Case("length-2^64-1", build("{}", b"", length=2**64 - 1), "header is 18,446,744,073,709,551,615 bytes long"),
    Case("length-100-MB-and-one", build("{}", b"", length=100_000_001), "header is 100,000,001 bytes long"),
    Case("length-100-MB", build("{}", b"", length=100_000_000), "ends within its header"),
    Case("trailing-bytes-of-none", build("{}", b"\0"), "has 1 bytes after its last tensor"),
]

ALL = [*DUPLICATES, *OFFSETS, *SHAPES, *ENTRIES, *METADATA, *JSON]
