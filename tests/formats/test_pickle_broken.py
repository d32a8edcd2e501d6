"""Files that are malformed, damaged on the way, or of a kind that is not read: refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdformats.errors import ChangedFile, CorruptFile, FormatError, UnknownFormat, UnsafeFile, UnsupportedFile
from sdformats.pickle import PickleSource, open_pickle
from tests.formats import hostile_pickles as h

if TYPE_CHECKING:
    from pathlib import Path

# Row 4: everything that can be malformed in a pickle.
BROKEN = {
    "empty": b"",
    "only the header": b"\x80\x02",
    "protocol 0": b"(dp0\n.",
    "protocol 1": b"\x80\x01}.",
    "protocol 6": b"\x80\x06}.",
    "protocol twice": b"\x80\x02\x80\x02}.",
    "no opcode": b"\x80\x02\x00.",
    "stop without anything": b"\x80\x02.",
    "two objects": b"\x80\x02}}.",
    "open mark": b"\x80\x02(}.",
    "pop of nothing": b"\x80\x020.",
    "mark of nothing": b"\x80\x02t.",
    "pop to no mark": b"\x80\x021.",
    "dup of nothing": b"\x80\x022.",
    "append to nothing": b"\x80\x02N\x61.",
    "append to a dict": b"\x80\x02}Na.",
    "append to a tuple": b"\x80\x02)Na.",
    "items of a list": b"\x80\x02]NNs.",
    "odd items": b"\x80\x02}(Nu.",
    "item of nothing": b"\x80\x02s.",
    "odd dict": b"\x80\x02(Nd.",
    "memo of nothing": b"\x80\x02q\0.",
    "memo never filled": b"\x80\x02h\x07.",
    "long memo never filled": b"\x80\x02j\x07\0\0\x08.",
    "memoize nothing": b"\x80\x04\x94.",
    "tuple of nothing": b"\x80\x02\x85.",
    "tuple of one of two": b"\x80\x02N\x86.",
    "call of nothing": b"\x80\x02R.",
    "call of one": b"\x80\x02)R.",
    "object of nothing": b"\x80\x02\x81.",
    "named object of nothing": b"\x80\x04\x92.",
    "state of nothing": b"\x80\x02b.",
    "state without object": b"\x80\x02}b.",
    "state of a number": b"\x80\x02K\x01}b.",
    "state of a list": b"\x80\x02]}b.",
    "reference to nothing": b"\x80\x02Q.",
    "reference to a number": b"\x80\x02K\x01Q.",
    "reference of one": b"\x80\x02(X\x07\0\0\0storagetQ.",
    "name from nothing": b"\x80\x04\x93.",
    "name from numbers": b"\x80\x04K\x01K\x02\x93.",
    "name cut": b"\x80\x02cos",
    "name of no text": b"\x80\x02c\xff\xfe\nx\n.",
    "name without end": b"\x80\x02c" + b"x" * 1000 + b"\n\n.",
    "text cut": b"\x80\x02X\xff\xff\xff\xffab.",
    "text of 2^62": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"ab.",
    "text of no text": b"\x80\x02X\x02\0\0\0\xff\xfe.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"ab.",
    "bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"ab.",
    "string of negative length": b"\x80\x02T\xff\xff\xff\xffab.",
    "long of negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "long of a megabyte": b"\x80\x02\x8b\0\0\x10\0" + bytes(1 << 20) + b".",
    "long cut": b"\x80\x02\x8a\x08ab",
    "decimal of nothing": b"\x80\x02I\n.",
    "decimal of words": b"\x80\x02Iabc\n.",
    "decimal of a thousand digits": b"\x80\x02I" + b"9" * 1000 + b"\n.",
    "float cut": b"\x80\x02G1234",
    "frame past the end": b"\x80\x04\x95" + struct.pack("<Q", 1000) + b"}.",
    "buffer of nothing": b"\x80\x05\x98.",
    "key twice": b"\x80\x02}(K\x01NK\x01Nu.",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_malformed_pickle(tmp_path: Path, fault: str) -> None:
    data = BROKEN[fault]
    h.assert_refused(h.write_zip(tmp_path / "x.pt", data), FormatError, "data.pkl")
    bare = tmp_path / "x.pkl"
    bare.write_bytes(data)
    h.assert_refused(bare, FormatError)


@pytest.mark.parametrize("size", range(0, 700, 7))
def test_cut_files(tmp_path: Path, size: int) -> None:
    """Cut at any length, each of the three kinds is refused."""
    zipped = h.build_zip(h.torch_members({"a": h.tensor()}))
    old = h.legacy({"a": h.tensor(held=h.storage("0", 6, None, None))}, ["0"], (6, h.FLOATS))
    bare = pickle.dumps({"a": torch.arange(60.0).numpy()}, protocol=4)
    for whole in (zipped, old, bare):
        path = tmp_path / "x.pt"
        path.write_bytes(whole[: min(size, len(whole) - 1)])
        h.assert_refused(path, FormatError)


ELEMENT = h.call(h.name("numpy", "dtype"), "f4")
ARGUMENTS = {
    "no arguments": h.call(h.name(*h.V2)),
    "text for a storage": h.tensor(held=h.Raw(h.dump("0"))),
    "text for a shape": h.tensor("6"),
    "negative shape": h.tensor((-6,)),
    "real shape": h.tensor((6.0,)),
    "true shape": h.tensor((True,)),
    "negative stride": h.tensor((6,), (-1,), 5),
    "negative offset": h.tensor((1,), (1,), -1),
    "strides of another rank": h.tensor((6,), (1, 1)),
    "signs of no dict": h.tensor((6,), (1,), 0, None, "conj"),
    "unknown signs": h.tensor((6,), (1,), 0, None, {"conjugate": True}),
    "signs of no truth": h.tensor((6,), (1,), 0, None, {"conj": 1}),
    "three hundred dimensions": h.tensor((1,) * 300, (1,) * 300),
    "parameter of text": h.call(h.name("torch._utils", "_rebuild_parameter"), "x", True, {}),
    "typed as a class": h.tensor((6,), (1,), 0, None, h.name("torch", "Size"), function=h.V3),
    "storage of a class": h.Raw(h.dump(("storage", h.name("torch", "Tensor"), "0", "cpu", 6)) + b"Q"),
    "storage of negative length": h.tensor(held=h.storage("0", -6)),
    "storage of true length": h.tensor(held=h.storage("0", True)),
    "storage of a numbered key": h.tensor(held=h.storage(0)),
    "storage of a long key": h.tensor(held=h.storage("0" * 100000)),
    "storage without a key": h.tensor(held=h.storage("")),
    "untyped where a type is needed": h.tensor(held=h.storage("0", 24, h.name("torch.storage", "UntypedStorage"))),
    "cpu tensor of another type": h.call(
        h.name("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"), h.tensor(), h.name("torch", "int8"), "xla", False
    ),
    "an array called": h.call(h.name("numpy", "ndarray"), (3,)),
    "array of five numbers": h.build(h.call(h.name("numpy.core.multiarray", "_reconstruct"), 0), (1, 2, 3, 4, 5)),
    "array of numbers for bytes": h.build(
        h.call(h.name("numpy.core.multiarray", "_reconstruct"), 0), (1, (1,), ELEMENT, False, 5)
    ),
    "element type of no state": h.build(ELEMENT, (3, "x")),
    "scalar of no type": h.call(h.name("numpy.core.multiarray", "scalar"), "f4", b"1234"),
    "buffer of no type": h.call(h.name("numpy.core.numeric", "_frombuffer"), b"1234", "f4", (1,), "C"),
    "forty dimensions": h.tensor((1,) * 40, (1,) * 40),
    "array of no state": h.build(h.call(h.name("numpy.core.multiarray", "_reconstruct"), 0), {}),
    "element type of a number": h.call(h.name("numpy", "dtype"), 3),
    "scalar of too many bytes": h.call(h.name("numpy.core.multiarray", "scalar"), ELEMENT, b"12"),
    "array of too few bytes": h.call(h.name("numpy.core.numeric", "_frombuffer"), b"12", ELEMENT, (1,), "C"),
    "dict of a number": h.call(h.name("collections", "OrderedDict"), 3),
    "dict of triples": h.call(h.name("collections", "OrderedDict"), [(1, 2, 3)]),
    "set of a number": h.call(h.name("builtins", "set"), 3),
    "bytes of no text": h.call(h.name("_codecs", "encode"), b"x", "latin1"),
    "bytes of wide text": h.call(h.name("_codecs", "encode"), "€", "latin1"),
    "a storage in bytes that is none": h.call(h.name("torch.storage", "_load_from_bytes"), h.program({})),
    "a tensor in bytes": h.call(h.name("torch.storage", "_load_from_bytes"), h.legacy({}, [])),
}  # fmt: skip


@pytest.mark.parametrize("fault", ARGUMENTS)
def test_malformed_arguments(tmp_path: Path, fault: str) -> None:
    h.assert_refused_value(tmp_path, {"a": ARGUMENTS[fault]}, FormatError, "malformed|dimensions|no storage")


# Row 7: more than one pickle.
def test_bytes_after_the_pickle(tmp_path: Path) -> None:
    for tail in (b"\0", b".", h.program({})):
        h.assert_refused_value(tmp_path, h.program({"a": h.tensor()}) + tail, UnsafeFile, "after its pickle")
        bare = tmp_path / "x.pkl"
        bare.write_bytes(h.program({}) + tail)
        h.assert_refused(bare, UnsafeFile, "after its pickle")
        old = tmp_path / "x.pt"
        old.write_bytes(h.legacy({"a": h.tensor()}, ["0"], (6, h.FLOATS)) + tail)
        h.assert_refused(old, CorruptFile, "after its last storage")


# Rows 9 and 10: records and numbers that do not fit.
def test_records_of_another_length(tmp_path: Path) -> None:
    for data in (h.FLOATS[:-4], h.FLOATS + b"1234", b""):
        h.assert_refused_value(
            tmp_path, {"a": h.tensor()}, CorruptFile, "expected 24, as the pickle says", records={"0": data}
        )
    h.assert_refused_value(tmp_path, {"a": h.tensor()}, CorruptFile, "is missing", records={})
    h.assert_refused_value(tmp_path, {"a": h.tensor((1,), (1,), 0, h.storage("../0"))}, CorruptFile, "is missing")


def test_numbers_past_64_bits(tmp_path: Path) -> None:
    for count in (2**61, 2**62, 2**63 - 1, 2**64 + 6):
        h.assert_refused_value(
            tmp_path,
            {"a": h.tensor((count,), (1,), 0, h.storage("0", count))},
            CorruptFile,
            "as the pickle says|malformed",
        )
        h.assert_refused_value(
            tmp_path, {"a": h.tensor((count, 4), (0, 0))}, CorruptFile, "more elements than|malformed"
        )
        h.assert_refused_value(tmp_path, {"a": h.tensor((6,), (count,))}, CorruptFile, "reaches to byte|malformed")
        h.assert_refused_value(tmp_path, {"a": h.tensor((6,), (1,), count)}, CorruptFile, "reaches to byte|malformed")
    h.assert_refused_value(tmp_path, {"a": h.tensor((2**32,) * 32, (0,) * 32)}, CorruptFile, "more elements than")


# Row 11: the old format's list of storages.
def test_storages_of_the_old_format(tmp_path: Path) -> None:
    value = {"a": h.tensor(held=h.storage("0", 6, None, None))}
    two = {"a": h.tensor(held=h.storage("0", 6, None, None)), "b": h.tensor(held=h.storage("0", 3, None, None))}
    part = {"a": h.tensor((2,), (1,), 0, h.storage("0", 6, None, ("v", 5, 2)))}
    full = (6, h.FLOATS)
    path = tmp_path / "x.pt"
    for data, match in (
        (h.legacy(value, []), "lacks the storage '0'"),
        (h.legacy(value, ["1"], full), "lacks the storage '0'|which nothing uses"),
        (h.legacy(value, ["0", "1"], full, full), "lists the storage '1', which nothing uses"),
        (h.legacy(value, ["0", "0"], full, full), "malformed list"),
        (h.legacy(value, {"0": 1}, full), "malformed list"),
        (h.legacy(value, [0], full), "malformed list"),
        (h.legacy(value, ["0"], (5, h.FLOATS)), "has 5 elements"),
        (h.legacy(value, ["0"], (-6, h.FLOATS)), "has -6 elements"),
        (h.legacy(value, ["0"], (6, h.FLOATS[:-1])), "cut short"),
        (h.legacy(value, ["0"]), "cut short"),
        (h.legacy(two, ["0"], full), "in two ways"),
        (h.legacy(part, ["0"], full), "beyond the end"),
        (h.legacy(value, ["0"], full, little=False), "big-endian"),
        (h.legacy(value, ["0"], full, version=1000), "unknown version"),
        (h.legacy({"m": h.Raw(h.dump(("module", "x")) + b"Q")}, []), "whole module"),
    ):
        path.write_bytes(data)
        h.assert_refused(path, FormatError, match)


# Row 12: views beyond their storage.
@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((2,), (6,), 0),
        ((1,), (1,), 6),
        ((2, 2), (3, 3), 0),
        ((3, 3), (2, 1), 0),
    ],
)
def test_views_beyond_the_storage(tmp_path: Path, shape: Any, stride: Any, offset: int) -> None:
    h.assert_refused_value(
        tmp_path, {"a": h.tensor(shape, stride, offset)}, CorruptFile, "reaches to byte 28 of its storage"
    )


# Rows 20 to 22: what is recognised and refused.
def tensors_of_other_kinds() -> dict[str, Any]:
    return {
        "a sparse tensor": torch.eye(2).to_sparse(),
        "without data": torch.empty(3, device="meta"),
        "a quantised tensor|QInt8": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "ComplexDouble": torch.ones(2, dtype=torch.complex128),
        "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_refused_by_name(tmp_path: Path) -> None:
    for match, value in tensors_of_other_kinds().items():
        for zipped in (True, False):
            torch.save({"x": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
            h.assert_refused(tmp_path / "x.pt", UnsupportedFile, match)


def test_signs_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    held = h.storage("0", 3, h.name("torch", "LongStorage"))
    h.assert_refused_value(
        tmp_path, {"a": h.tensor((3,), (1,), 0, held, {"neg": True})}, UnsupportedFile, "type I64 that is to be negated"
    )


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    h.assert_refused(tmp_path / "x.pt", UnsupportedFile, "TorchScript")


def test_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        info = tarfile.TarInfo("storages")
        archive.addfile(info, io.BytesIO())
    h.assert_refused(tmp_path / "x.pt", UnsupportedFile, "tar archive")


def test_other_zip_files(tmp_path: Path) -> None:
    for name, match in (
        ("a.npy", "numpy archive"),
        ("m.safetensors", "model files in it"),
        ("x.txt", "none that torch.save"),
    ):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr(name, b"data")
        h.assert_refused(tmp_path / "x.pt", UnsupportedFile, match)


def test_bare_storages_have_no_shape(tmp_path: Path) -> None:
    h.assert_refused_value(tmp_path, {"a": h.storage()}, UnsupportedFile, "bare storage 'a'")


def test_tensors_under_classes_have_no_name(tmp_path: Path) -> None:
    kind = h.name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    h.assert_refused_value(tmp_path, {"x": {kind: h.tensor()}}, UnsupportedFile, "under a key that is the class")
    h.assert_refused_value(tmp_path, {"\ud800": h.tensor()}, CorruptFile, "the tensor name")


# Row 23: a file that changes while it is read.
def test_cut_while_it_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50_000), "b": torch.zeros(50_000)}, tmp_path / "x.pt")
    with open_pickle(tmp_path / "x.pt") as source:
        os.truncate(tmp_path / "x.pt", 250_000)
        source.read("a")
        with pytest.raises(ChangedFile, match="cut short while it was read"):
            source.read("b")
        with pytest.raises(ChangedFile):
            source.verify()


def test_other_bytes_the_second_time(tmp_path: Path) -> None:
    path = h.write_zip(tmp_path / "x.pt", {"a": h.tensor()})
    with open_pickle(path) as source:
        source.read("a")
        source.read_into("a", 4, memoryview(bytearray(8)))
        data = bytearray(path.read_bytes())
        data[data.index(h.FLOATS) + 8] ^= 1
        with path.open("r+b") as file:
            file.write(data)
        with pytest.raises(ChangedFile, match="other bytes"):
            source.read("a")
        with pytest.raises(ChangedFile, match="other bytes"):
            source.verify()


def test_long_bare_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdformats.pickle_stream

    monkeypatch.setattr(sdformats.pickle_stream, "MAX_PICKLE", 1 << 20)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(["x" * 1000 for _ in range(3000)] + [i * "y" for i in range(2000)], protocol=4))
    h.assert_refused(path, UnsafeFile, "pickle that is too long")
    path.write_bytes(pickle.dumps({"a": torch.zeros(1 << 20).numpy()}, protocol=4))
    with PickleSource(path) as source:
        assert source.specs["a"].nbytes == 4 << 20


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        open_pickle(tmp_path / "none.pt")
    (tmp_path / "none.pt").mkdir()
    with pytest.raises(FormatError, match="cannot be read"):
        open_pickle(tmp_path / "none.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(UnknownFormat):
        open_pickle(tmp_path / "empty.pt")
