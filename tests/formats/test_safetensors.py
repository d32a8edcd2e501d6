"""The safetensors container: exact bytes, the reference library as the judge, hostile headers, mutations."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from sdformats.errors import ChangedFile, CorruptFile, FormatError, WriteError
from sdformats.positional import InputFile
from sdformats.safetensors import MAX_HEADER, SafetensorsSink, SafetensorsSource, layout, looks_like_safetensors
from sdformats.tensor import DType, Spec
from tests.formats import hostile_safetensors as hostile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROPERTY = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NAMES = TEXTS.filter(lambda name: name != "__metadata__")
TORCH = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.int16: DType.I16,
    torch.int32: DType.I32,
    torch.int64: DType.I64,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.complex64: DType.C64,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.uint16: DType.U16,
    torch.uint32: DType.U32,
    torch.uint64: DType.U64,
}
SMALL = hostile.build(
    {
        "__metadata__": {"format": "pt", "n\u00e4me": "w\u2028"},
        "a": hostile.entry("F32", [2], [0, 8]),
        "b/\u00fc": hostile.entry("F16", [], [8, 10]),
        "c": hostile.entry("F4", [4], [10, 12]),
        "d": hostile.entry("I64", [0, 3], [12, 12]),
    },
    bytes(range(12)),
)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Spec]:
    """Any tensors that a safetensors file can hold: all types, rank 0 to 4, zero sizes, any names."""
    found = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        spec = Spec(shape, draw(st.sampled_from(DType)))
        if spec.numel * spec.dtype.bits % 8 == 0:
            found[name] = spec
    return found


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fill(name: str, spec: Spec) -> bytes:
    """Bytes that differ from tensor to tensor and from place to place."""
    return bytes((len(name) * 31 + i * 7 + spec.dtype.bits) % 2 for i in range(spec.nbytes))


def write(path: Path, wanted: dict[str, Spec], metadata: dict[str, str]) -> Path:
    with SafetensorsSink(path, wanted, metadata, overwrite=True) as sink:
        for name, spec in wanted.items():
            data, half = fill(name, spec), spec.nbytes // 2
            sink.write(name, half, memoryview(data)[half:])
            sink.write(name, 0, memoryview(data)[:half])
    return path


def seen(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """What our reader finds in a file."""
    with SafetensorsSource(path) as source:
        tensors = {name: (s.dtype.name, list(s.shape), bytes(source.read(name))) for name, s in source.specs.items()}
        return tensors, dict(source.metadata)


def seen_by_library(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """What the reference library finds in it."""
    found: list[tuple[str, dict[str, Any]]] = deserialize(path.read_bytes())
    with safe_open(str(path), "numpy") as opened:
        metadata = opened.metadata() or {}
    return {name: (str(v["dtype"]), list(v["shape"]), bytes(v["data"])) for name, v in found}, metadata


def test_the_bytes_of_a_small_file(tmp_path: Path) -> None:
    wanted = {"b": Spec((3,), DType.U8), "é": Spec((1, 2), DType.F16), "s": Spec((), DType.F32)}
    with SafetensorsSink(tmp_path / "f", wanted, {"format": "pt"}) as sink:
        sink.write("b", 1, memoryview(b"BC"))
        sink.write("é", 0, memoryview(b"wxyz"))
        sink.write("b", 0, memoryview(b"A"))
        sink.write("s", 0, memoryview(b"1234"))
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        '"é":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]},'
        '"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}       '
    ).encode()
    assert len(header) % 8 == 0
    assert (tmp_path / "f").read_bytes() == struct.pack("<Q", len(header)) + header + b"1234wxyzABC"


def test_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f", {}, {})
    assert path.read_bytes() == b"\x08" + bytes(7) + b"{}      "
    assert seen(path) == ({}, {}) == seen_by_library(path)


def test_what_a_source_tells(tmp_path: Path) -> None:
    with SafetensorsSource(put(tmp_path / "f", SMALL)) as source:
        start = len(SMALL) - 12
        assert source.container == "safetensors"
        assert source.data_start == start
        assert list(source.specs) == ["a", "b/ü", "c", "d"]
        assert source.specs["c"] == Spec((4,), DType.F4)
        assert source.metadata == {"format": "pt", "näme": "w\u2028"}
        assert [source.position(name) for name in source.specs] == [(0, start + n) for n in (0, 8, 10, 12)]
        part = bytearray(3)
        source.read_into("a", 4, memoryview(part))
        assert part == bytes([4, 5, 6])
        source.verify()


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {name: hostile.entry("U8", [2], [at, at + 2]) for name, at in (("x", 4), ("y", 0), ("z", 2))}
    tensors, _ = seen(put(tmp_path / "f", hostile.build(header, b"012345")))
    assert [(name, data) for name, (_, _, data) in tensors.items()] == [("y", b"01"), ("z", b"23"), ("x", b"45")]


@PROPERTY
@given(specs(), st.dictionaries(TEXTS, TEXTS, max_size=3))
@example({'w\u0000"\\\x7f\u202e😀': Spec((2,), DType.F4), "": Spec((), DType.BF16)}, {"": "\x1b[31m"})
def test_what_is_written_is_read_by_us_and_by_the_library(
    tmp_path: Path, wanted: dict[str, Spec], metadata: dict[str, str]
) -> None:
    path = write(tmp_path / "f", wanted, metadata)
    tensors, texts = seen(path)
    assert tensors == {name: (spec.dtype.name, list(spec.shape), fill(name, spec)) for name, spec in wanted.items()}
    assert texts == metadata
    assert (tensors, texts) == seen_by_library(path)


@PROPERTY
@given(specs())
def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path, wanted: dict[str, Spec]) -> None:
    header, offsets = layout(wanted, {})
    assert len(header) % 8 == 0
    assert all(offsets[name] % max(1, spec.dtype.itemsize) == 0 for name, spec in wanted.items())
    with SafetensorsSource(write(tmp_path / "f", wanted, {})) as source:
        assert {name: source.position(name)[1] for name in wanted} == offsets


@PROPERTY
@given(
    specs(),
    st.none() | st.dictionaries(TEXTS, TEXTS, max_size=3),
    st.integers(0, 9),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_valid_header_is_read(
    tmp_path: Path, wanted: dict[str, Spec], metadata: dict[str, str] | None, pad: int, ascii_: bool, order: Any
) -> None:
    """Spelled as others spell it: any order of entries, any padding, escapes or not, aligned or not."""
    data, entries = b"", []
    for name, spec in wanted.items():
        begin, data = len(data), data + fill(name, spec)
        fields = list(hostile.entry(spec.dtype.name, list(spec.shape), [begin, len(data)]).items())
        order.shuffle(fields)
        entries.append((name, dict(fields)))
    if metadata is not None:
        entries.append(("__metadata__", metadata))  # type: ignore[arg-type]
    order.shuffle(entries)
    text = json.dumps(dict(entries), ensure_ascii=ascii_, indent=order.choice([None, 1])) + " " * pad
    path = put(tmp_path / "f", hostile.build(text, data))
    tensors, texts = seen(path)
    assert tensors == {name: (spec.dtype.name, list(spec.shape), fill(name, spec)) for name, spec in wanted.items()}
    assert texts == (metadata or {})
    assert (tensors, texts) == seen_by_library(path)


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_torch_tensors_go_both_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(2 * 3 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    saved = {
        "w": raw.view(dtype).reshape(2, 3),
        "scalar": raw.view(dtype)[1].clone(),
        "none": raw.view(dtype)[:0].clone(),
    }
    save_file(saved, str(tmp_path / "theirs"), metadata={"k": "v"})
    with SafetensorsSource(tmp_path / "theirs") as source:
        assert source.specs == {name: Spec(tuple(t.shape), TORCH[dtype]) for name, t in saved.items()}
        with SafetensorsSink(tmp_path / "ours", source.specs, source.metadata) as sink:
            for name in source.specs:
                assert source.read(name) == bytes(saved[name].reshape(-1).view(torch.uint8).tolist())
                sink.write(name, 0, memoryview(source.read(name)))
    loaded = load_file(str(tmp_path / "ours"))
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("case", hostile.ALL, ids=lambda case: case.name)
def test_hostile_files_are_one_line(tmp_path: Path, case: hostile.Case) -> None:
    path = put(tmp_path / "f.safetensors", case.content)
    with pytest.raises(CorruptFile) as caught:
        SafetensorsSource(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert case.says in message
    assert message.isprintable()
    assert len(message) < 1500


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL)):
        path = put(tmp_path / "f", SMALL[:length])
        with pytest.raises(CorruptFile):
            SafetensorsSource(path)


def test_a_header_over_100_mb_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "f", struct.pack("<Q", MAX_HEADER + 1) + b"{")
    os.truncate(path, 200_000_000)
    read: list[int] = []
    real = os.preadv

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(len(buffers[0]))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    with pytest.raises(CorruptFile, match=r"header is 100,000,001 bytes long \(expected at most 100,000,000\)"):
        SafetensorsSource(path)
    assert sum(read) == 8


def _flip(content: bytearray, at: int, byte: int) -> None:
    content[at % len(content)] ^= byte or 1


def _insert(content: bytearray, at: int, byte: int) -> None:
    content.insert(at % len(content), byte)


def _delete(content: bytearray, at: int, byte: int) -> None:
    del content[at % len(content) : at % len(content) + 1 + byte % 7]


def _replace(content: bytearray, at: int, byte: int) -> None:
    content[at % len(content)] = b'{}[]",:0123456789-e.\\u \n'[byte % 24]


def _repair(content: bytearray, at: int, byte: int) -> None:
    """Make the length say what the header is now, so that mutations reach past the first check."""
    end = content.rfind(b"}}", 8)
    if end > 0:
        content[:8] = struct.pack("<Q", end + 2 - 8)


MUTATIONS = (_flip, _insert, _delete, _replace, _repair)


@settings(PROPERTY, max_examples=600)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(MUTATIONS), st.integers(0, len(SMALL) - 13) | st.integers(0, 2000), st.integers(0, 255)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_mutation_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, steps: list[tuple[Callable[[bytearray, int, int], None], int, int]]
) -> None:
    content = bytearray(SMALL)
    for mutate, at, byte in steps:
        if len(content) > 8:
            mutate(content, at, byte)
    path = put(tmp_path / "f", bytes(content))
    try:
        ours = seen(path)
    except FormatError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - both outcomes are right
        return
    (length,) = struct.unpack("<Q", content[:8])
    assert sum(len(data) for _, _, data in ours[0].values()) == len(content) - 8 - length
    try:
        theirs = seen_by_library(path)
    except (SafetensorError, UnicodeDecodeError):
        assert b"-0" in content  # a whole number in JSON, which the library does not take for 0
        return
    assert ours == theirs


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = put(tmp_path / "f", SMALL)
    with SafetensorsSource(path) as source:
        os.truncate(path, len(SMALL) - 8)
        part = bytearray(4)
        source.read_into("a", 0, memoryview(part))
        assert part == bytes([0, 1, 2, 3])
        for name in ("a", "b/ü", "c"):
            with pytest.raises(ChangedFile, match="cut short"):
                source.read(name)
        with pytest.raises(ChangedFile, match="changed while"):
            source.verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(SMALL + b"x"),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: put(path.with_name("other"), SMALL).replace(path),
        lambda path: path.unlink(),
    ],
    ids=["appended", "touched", "replaced", "deleted"],
)
def test_verify_tells_of_every_change(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = put(tmp_path / "f", SMALL)
    with SafetensorsSource(path) as source:
        source.verify()
        change(path)
        with pytest.raises(ChangedFile):
            source.verify()


def test_a_broken_file_is_closed_again(tmp_path: Path) -> None:
    file = InputFile(put(tmp_path / "f", hostile.DUPLICATES[0].content))
    with pytest.raises(CorruptFile):
        SafetensorsSource(file)
    with pytest.raises(AssertionError, match="closed file"):
        file.read(0, 1)


@pytest.mark.parametrize(
    ("wanted", "metadata", "says"),
    [
        ({"__metadata__": Spec((1,), DType.U8)}, {}, "is no name that a safetensors file can hold"),
        ({"\ud800": Spec((1,), DType.U8)}, {}, "is no name that a safetensors file can hold"),
        ({"w": Spec((3,), DType.F4)}, {}, "fills no whole number of bytes as F4"),
        ({"w": Spec((1,), DType.F6_E3M2)}, {}, "fills no whole number of bytes"),
        ({}, {"a": "\udc00"}, "half a surrogate pair"),
        ({}, {"\udc00": "a"}, "half a surrogate pair"),
        ({"n" * MAX_HEADER: Spec((1,), DType.U8)}, {}, "needs a header of 100,000,"),
    ],
    ids=["metadata", "surrogate", "half-a-byte", "six-bits", "text", "key", "long"],
)
def test_what_a_file_cannot_say_is_not_written(
    tmp_path: Path, wanted: dict[str, Spec], metadata: dict[str, str], says: str
) -> None:
    with pytest.raises(WriteError, match=says):
        SafetensorsSink(tmp_path / "f", wanted, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> None:
        with SafetensorsSink(tmp_path / "f", {"w": Spec((4,), DType.U8)}, {}) as sink:
            sink.write("w", 0, memoryview(b"1234"))
            raise KeyError("w")

    with pytest.raises(KeyError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_looks() -> None:
    assert looks_like_safetensors(SMALL[:9], len(SMALL))
    assert not looks_like_safetensors(SMALL[:8], 8)
    assert not looks_like_safetensors(SMALL[:9], 20)
    assert not looks_like_safetensors(struct.pack("<Q", MAX_HEADER + 1) + b"{", 2**40)
    assert not looks_like_safetensors(b"PK\x03\x04" + bytes(5), 10**6)
