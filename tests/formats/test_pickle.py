"""What honest programs write: everything torch can save is read to the same bytes that torch reads."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdformats.errors import FormatError, UnknownFormat, UnsafeFile, UnsupportedFile
from sdformats.pickle import PickleSource, looks_like_pickle, looks_like_zip, open_pickle
from sdformats.records import Recent
from tests.formats import hostile_pickles as h
from tests.formats.pickle_oracle import TYPES, check, flatten, raw, save

REAL = Path(__file__).parents[2].parent / "shared" / "real"


def sample(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(30).reshape(6, 5) * 0.75
    return (values + 1j * values.flip(0)).to(dtype) if dtype.is_complex else values.to(dtype)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_and_view_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    values: dict[str, torch.Tensor] = {}
    for dtype in TYPES:
        whole = sample(dtype)
        values |= {
            f"{dtype}.whole": whole,
            f"{dtype}.tied": whole,
            f"{dtype}.transposed": whole.t(),
            f"{dtype}.column": whole[2:, 1],
            f"{dtype}.rows": whole[2:4],
            f"{dtype}.scalar": whole[3, 3],
            f"{dtype}.empty": whole[:0],
            f"{dtype}.expanded": whole[1:2].expand(4, 5),
        }
    path = save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    source = check(path, values)
    assert source.container == ("torch-zip" if zipped else "torch-legacy")
    assert source.notes == ()


@pytest.mark.parametrize("zipped", [True, False])
def test_signs_that_torch_applies_lazily_are_applied(tmp_path: Path, zipped: bool) -> None:
    number = sample(torch.complex64)
    values = {
        "conj": number.conj(),
        "neg": number.clone().conj().imag,
        # torch negates a complex zero to zero without a sign; these have none.
        "both": torch._neg_view((number + 1 + 1j).conj()),
        "real": torch._neg_view(torch.arange(6.0)),
        "half": torch._neg_view(torch.arange(6.0).half().reshape(2, 3).t()),
    }
    assert values["conj"].is_conj()
    assert values["neg"].is_neg()
    check(save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped), values)


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    plain, rich, tensor = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2)), torch.full((4,), 2.0)
    rich.origin, tensor.origin = "here", "there"  # type: ignore[attr-defined]
    values = {"plain": plain, "rich": rich, "tensor": tensor}
    source = check(save(values, tmp_path / "x.pt"), values)
    assert source.notes == ("left out: attributes of dicts or tensors ('origin')",)


def test_a_state_dict_keeps_its_names_and_hides_nothing_else(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    source = check(save(module.state_dict(), tmp_path / "x.pt"), dict(module.state_dict()))
    assert source.notes == ()


def test_order_is_that_of_the_bytes_and_positions_point_at_them(tmp_path: Path) -> None:
    values = {f"t{9 - i}": torch.full((3,), float(i)) for i in range(8)}
    path = save(values, tmp_path / "x.pt")
    with open_pickle(path) as source:
        places = [source.position(name) for name in source.specs]
        assert places == sorted(places)
        data = path.read_bytes()
        for name in source.specs:
            index, offset = source.position(name)
            assert index == 0
            assert data[offset : offset + 12] == raw(values[name])


class TestBarePickles:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_tensors_and_arrays(self, tmp_path: Path, protocol: int) -> None:
        array = np.arange(6000, dtype=np.float32).reshape(3000, 2)
        values: dict[str, Any] = {
            "tensor": torch.arange(5000.0),
            "small": torch.arange(3, dtype=torch.bfloat16),
            "array": array,
            "columns": array.T,
            "big": array.astype(">f4"),
            "flags": np.array([True, False]),
            "zero": np.array(2.5, np.float16),
            "empty": np.zeros((0, 3), np.int64),
        }
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(values, protocol=protocol))
        expected = {name: v if isinstance(v, torch.Tensor) else torch.tensor(v.astype(v.dtype.newbyteorder("=")))
                    for name, v in values.items()}  # fmt: skip
        assert check(path, expected).container == "pickle"

    def test_large_bytes_are_read_from_the_file_not_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        array = np.arange(4096, dtype=np.float64)
        path.write_bytes(pickle.dumps({"a": array}, protocol=5))
        with open_pickle(path) as source:
            _, offset = source.position("a")
            assert path.read_bytes()[offset : offset + array.nbytes] == array.tobytes()

    def test_a_bare_array_has_the_empty_name(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(np.arange(3.0)))
        check(path, {"": torch.arange(3.0, dtype=torch.float64)})

    def test_arrays_of_objects_are_told_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps({"o": np.array([None, "x"], object), "t": np.zeros(2), "s": np.float32(1.5)}))
        with open_pickle(path) as source:
            assert list(source.specs) == ["t"]
            assert source.metadata == {"s": "1.5"}
            assert source.notes == ("left out, as they are no tensors: o",)

    def test_python_2_strings_as_names_and_data(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        state = (
            1,
            (2,),
            h.build(h.call(h.name("numpy", "dtype"), h.Raw(b"U\x02f4"), 0, 1), (3, h.Raw(b"U\x01<"), None)),
            False,
        )
        body = b"".join(map(h.dump, state)) + b"U\x08" + np.array([1.0, -1.0], "<f4").tobytes()
        empty = h.call(
            h.name("numpy.core.multiarray", "_reconstruct"), h.name("numpy", "ndarray"), (0,), h.Raw(b"U\x01b")
        )
        array = empty + b"(" + body + b"tb"
        path.write_bytes(b"\x80\x02}U\x06weight" + array + b"s.")
        check(path, {"weight": torch.tensor([1.0, -1.0])})


def test_weights_inside_the_pickle_as_devices_without_storages_write_them(tmp_path: Path) -> None:
    numpy_types = ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")
    make, kind, dtype = (h.name(*full) for full in numpy_types)
    values = np.array([[1.0, -2.5], [0.5, 3.0]], np.float32)

    def array(data: np.ndarray[Any, Any], code: str) -> h.Raw:
        text = h.call(h.name("_codecs", "encode"), data.tobytes().decode("latin1"), "latin1")
        element = h.build(h.call(dtype, code, False, True), (3, "<", None, None, None, -1, -1, 0))
        return h.build(h.call(make, kind, (0,), b"b"), (1, data.shape, element, False, text))

    rebuild = h.name("torch._utils", "_rebuild_device_tensor_from_numpy")
    value = {
        "f": h.call(rebuild, array(values, "f4"), h.name("torch", "float32"), "mps", False),
        "b": h.call(rebuild, array(values, "f4"), h.name("torch", "bfloat16"), "mps", False),
    }
    path = h.write_zip(tmp_path / "x.pt", value, {})
    check(path, {"f": torch.from_numpy(values), "b": torch.from_numpy(values).bfloat16()})
    third = np.array([1 / 3], np.float32)
    value = {"b": h.call(rebuild, array(third, "f4"), h.name("torch", "bfloat16"), "mps", False)}
    with pytest.raises(UnsupportedFile, match="stored as F32"):
        open_pickle(h.write_zip(tmp_path / "y.pt", value, {}))


def test_memo_keys_may_be_large(tmp_path: Path) -> None:
    huge = b"\x80\x02}r\x00\x00\x00\x08X\x01\x00\x00\x00a" + h.tensor() + b"s."
    with open_pickle(h.write_zip(tmp_path / "x.pt", huge)) as source:
        assert source.read("a") == h.FLOATS


def test_the_first_storages_could_be_parts_of_others(tmp_path: Path) -> None:
    part = h.storage("0", 6, None, ("v", 2, 3))
    whole = h.storage("0", 6, None, None)
    old = ("torch._utils", "_rebuild_tensor")
    made = h.call(h.name(*old), part, 1, (2,), (1,))
    path = tmp_path / "x.pt"
    path.write_bytes(h.legacy({"part": made, "whole": h.tensor((6,), (1,), 0, whole)}, ["0"], (6, h.FLOATS)))
    check(path, {"part": torch.tensor([3.0, 4.0]), "whole": torch.arange(6.0)})


def test_spellings_that_few_writers_use(tmp_path: Path) -> None:
    element = h.call(h.name("numpy", "dtype"), "f4")
    objects = h.call(h.name("numpy", "dtype"), "O8")
    cpu = h.name("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")
    value = {
        "pairs": h.call(h.name("collections", "OrderedDict"), [["t", h.tensor()]]),
        "moved": h.call(cpu, h.tensor(), h.name("torch", "float32"), "xla:0", False),
        "flag": h.Raw(b"I01\n"),
        "number": h.Raw(b"I12345678901\n"),
        "scalar": h.call(h.name("numpy.core.multiarray", "scalar"), element, h.Raw(b"U\4\0\0\x80?")),
        "object": h.call(h.name("numpy.core.multiarray", "scalar"), objects, None),
        "buffer": h.call(h.name("numpy.core.numeric", "_frombuffer"), b"", objects, (0,), "C"),
        "bytes": h.call(h.name("builtins", "bytearray"), b"x"),
        "named": h.Raw(h.name("argparse", "Namespace") + b")}\x92"),
        "old": h.call(h.name("copyreg", "_reconstructor"), h.name("collections", "OrderedDict")),
        "kind": h.Raw(h.name("numpy.dtypes", "Float64DType")),
        "set": h.Raw(b"\x8f(K\1K\2\x90"),
        h.Raw(h.name("argparse", "Namespace")): 3,
    }
    path = h.write_zip(tmp_path / "x.pt", value)
    source = check(path, {"pairs.t": torch.arange(6.0), "moved": torch.arange(6.0)})
    assert source.metadata == {
        "flag": "true", "number": "12345678901", "scalar": "1.0", "old": "{}", "set": "[1, 2]",
    }  # fmt: skip
    assert source.notes == (
        "left out, as they are no tensors: object [numpy.core.multiarray.scalar], buffer, bytes, named [argparse.Namespace], "
        "kind [numpy.dtypes.Float64DType], argparse.Namespace",
    )


def test_what_was_costly_is_kept_within_a_budget() -> None:
    made: list[str] = []
    recent = Recent(100)

    def ask(key: str, size: int) -> None:
        data = recent.get(key, lambda: made.append(key) or bytes(size))  # type: ignore[func-returns-value]
        assert len(data) == size

    for key, size in (("a", 40), ("b", 40), ("a", 40), ("c", 40), ("a", 40), ("b", 40), ("d", 500), ("d", 500)):
        ask(key, size)
    assert made == ["a", "b", "c", "b", "d"]
    recent.clear()
    ask("d", 500)
    assert made[-2:] == ["d", "d"]


@pytest.mark.parametrize("head", [b"\x80\x02}q\x00", b"\x80\x04\x95\x10\0\0\0\0\0", h.MAGIC[:9]])
def test_what_looks_like_a_pickle(head: bytes) -> None:
    assert looks_like_pickle(head)
    assert not looks_like_zip(head)


@pytest.mark.parametrize("head", [b"", b"\x80\x02", b"\x80\x06}q\0", b"\x80\x01}q\0", b"PK\3\4", b"(dp0\n",
                                  b"\x80\x02\0\0\0\0\0\0{", b"\x80\x02}\0\0\0\0\0{"])  # fmt: skip
def test_what_does_not(head: bytes) -> None:
    assert not looks_like_pickle(head)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80", b"GGUF" + bytes(300), b"<html>" + bytes(300), b"(dp0\n."])
def test_other_files_are_not_known(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UnknownFormat):
        open_pickle(path)


def test_a_limit_can_be_raised(tmp_path: Path) -> None:
    value = {
        "a": h.tensor((1 << 20, 6), (0, 1)),
        "b": h.tensor((1 << 20, 6), (0, 1)),
        "c": h.tensor((1 << 20, 6), (0, 1)),
    }
    path = h.write_zip(tmp_path / "x.pt", value)
    with pytest.raises(UnsafeFile, match="claims 75,497,472 bytes"):
        open_pickle(path)
    with open_pickle(path, limit=1 << 30) as source:
        data = bytearray(48)
        source.read_into("b", 24, memoryview(data))
        assert data == h.FLOATS * 2


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_real_files_read_as_torch_reads_them() -> None:
    listed = [
        entry for entry in json.loads((REAL / "manifest.json").read_text()) if entry["pickle_globals"] is not None
    ]
    listed = [entry for entry in listed if entry["file"].endswith((".pt", ".bin", ".pth"))]
    assert len(listed) == 13
    for entry in listed:
        path = REAL / entry["file"]
        if "ParameterDict" in entry["note"]:
            # weights_only refuses the class, so the storages themselves say what is right.
            with zipfile.ZipFile(path) as archive:
                token, vector = (bytearray(archive.read(f"archive/data/{key}")) for key in "01")
            expected = {
                "string_to_token.*": torch.frombuffer(token, dtype=torch.int64)[1],
                "string_to_param.*": torch.frombuffer(vector, dtype=torch.float32).reshape(1, 768),
            }
        else:
            expected = flatten(torch.load(path, map_location="cpu", weights_only=True))
        source = check(path, expected)
        assert len(source.specs) == entry["n_tensors"], entry["file"]


def test_an_open_file_is_taken_over_and_closed_on_failure(tmp_path: Path) -> None:
    from sdformats.positional import InputFile

    path = tmp_path / "x.pt"
    path.write_bytes(b"nothing")
    file = InputFile(path)
    with pytest.raises(FormatError):
        PickleSource(file)
    assert file._handle is None
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    path.write_bytes(buffer.getvalue())
    with open_pickle(InputFile(path)) as source:
        assert source.path == path
