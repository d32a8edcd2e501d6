"""The contract of tensors and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sdformats.errors import ChangedFile
from sdformats.positional import InputFile
from sdformats.tensor import DType, Spec, TensorSink, TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WIDTHS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "C64 F64 I64 U64",
}


class OneFile(TensorSource):
    """A file that is one tensor of bytes."""

    container = "raw"
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (InputFile(path),)
        self.specs = {"all": Spec((self.files[0].size,), DType.U8)}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.files[0].read_into(offset, buffer)

    def position(self, name: str) -> tuple[int, int]:
        return 0, 0


class Recorder(TensorSink):
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        self.told.append(f"{name}@{offset}: {bytes(buffer)!r}")

    def commit(self) -> None:
        self.told.append("commit")

    def abort(self) -> None:
        self.told.append("abort")


def test_every_type_has_a_width_of_its_own_member() -> None:
    expected = {name: bits for bits, names in WIDTHS.items() for name in names.split()}
    assert {dtype.name: dtype.bits for dtype in DType} == expected
    assert {dtype.name: dtype.itemsize for dtype in DType} == {name: bits // 8 for name, bits in expected.items()}
    assert all(str(dtype) == dtype.name for dtype in DType)


def test_floats_are_what_can_be_merged() -> None:
    floats = {dtype.name for dtype in DType if dtype.is_float}
    assert floats == {name for names in WIDTHS.values() for name in names.split() if name.startswith(("F", "BF"))}
    assert {"BOOL", "C64", "I8", "U64"}.isdisjoint(floats)


@pytest.mark.parametrize(
    ("shape", "dtype", "numel", "nbytes", "text"),
    [
        ((), DType.F32, 1, 4, "F32 []"),
        ((0,), DType.F32, 0, 0, "F32 [0]"),
        ((3, 0, 2**62), DType.I64, 0, 0, f"I64 [3, 0, {2**62}]"),
        ((320, 4, 3, 3), DType.F16, 11520, 23040, "F16 [320, 4, 3, 3]"),
        ((2, 3), DType.F4, 6, 3, "F4 [2, 3]"),
        ((4,), DType.F6_E2M3, 4, 3, "F6_E2M3 [4]"),
        ((2**40, 2**40), DType.U8, 2**80, 2**80, f"U8 [{2**40}, {2**40}]"),
    ],
)
def test_spec(shape: tuple[int, ...], dtype: DType, numel: int, nbytes: int, text: str) -> None:
    spec = Spec(shape, dtype)
    assert (spec.numel, spec.nbytes, str(spec)) == (numel, nbytes, text)
    assert spec == Spec(shape, dtype)
    assert len({spec, Spec(shape, dtype)}) == 1


@pytest.mark.parametrize("shape", [(), (0, 5), (3, 4)])
def test_spec_counts_as_torch_does(shape: tuple[int, ...]) -> None:
    for dtype, theirs in ((DType.BF16, torch.bfloat16), (DType.C64, torch.complex64), (DType.BOOL, torch.bool)):
        tensor = torch.empty(shape, dtype=theirs)
        assert (Spec(shape, dtype).numel, Spec(shape, dtype).nbytes) == (tensor.numel(), tensor.nbytes)


def test_a_source_reads_verifies_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"tensor")
    with OneFile(path) as source:
        assert source.read("all") == b"tensor"
        assert source.notes == ()
        source.verify()
        path.write_bytes(b"other!!")
        with pytest.raises(ChangedFile, match="changed while it was being read"):
            source.verify()
    with pytest.raises(AssertionError, match="closed file"):
        source.read("all")
    assert source.specs["all"].nbytes == 6


def test_a_sink_commits_only_what_ended_well() -> None:
    with Recorder() as sink:
        sink.write("w", 3, memoryview(b"abc"))
    assert sink.told == ["w@3: b'abc'", "commit"]
    for kind in (ValueError, KeyboardInterrupt):
        sink = Recorder()
        with pytest.raises(kind), sink:
            raise kind
        assert sink.told == ["abort"]
