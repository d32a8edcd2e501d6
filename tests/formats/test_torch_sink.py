"""Files for torch.load: judged by torch, zipfile and our own reader."""

from __future__ import annotations

import pickletools
import random
import threading
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdformats import torch_sink
from sdformats.errors import CorruptFile, WriteError
from sdformats.pickle import open_pickle
from sdformats.positional import InputFile
from sdformats.tensor import DType, Spec
from sdformats.torch_pickle import MAX_DEPTH, TensorNamed
from sdformats.torch_sink import TorchZipSink
from sdformats.torchzip import read_directory
from tests.formats.output_ways import listing
from tests.formats.pickle_oracle import TYPES, check, flatten, raw, same, specs_of, write

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.torch_pickle import Tree

SHAPES = [(), (0,), (0, 3), (1,), (7,), (3, 2), (2, 3, 4, 5)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bytes at all; but only 0 and 1 for booleans."""
    size = torch.empty(shape, dtype=dtype).nbytes
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


EVERY = {
    f"{str(dtype).removeprefix('torch.')}{list(shape)}": random_tensor(shape, dtype, seed)
    for seed, (dtype, shape) in enumerate((dtype, shape) for dtype in TYPES for shape in SHAPES)
}


class TestReaders:
    @pytest.mark.parametrize("mmap", [False, True])
    def test_torch_loads_every_type_and_shape(self, tmp_path: Path, mmap: bool) -> None:
        loaded = torch.load(write(tmp_path / "x.pt", EVERY), weights_only=True, mmap=mmap)
        assert same(loaded, EVERY)
        assert all(tensor.is_contiguous() for tensor in loaded.values())

    def test_our_reader_reads_every_type_and_shape(self, tmp_path: Path) -> None:
        source = check(write(tmp_path / "x.pt", EVERY, block=7), EVERY)
        assert (source.container, source.notes) == ("torch-zip", ())

    def test_zipfile_finds_every_checksum_right(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(write(tmp_path / "x.pt", EVERY)) as file:
            assert file.testzip() is None
            assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
            assert file.read("archive/version") == b"3\n"
            assert file.read("archive/data/4") == raw(list(EVERY.values())[4])

    def test_storages_are_aligned(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.pt", EVERY)
        with open_pickle(path) as source:
            assert {source.position(name)[1] % 64 for name in source.specs} == {0}

    def test_torch_s_own_pickle_says_the_same(self, tmp_path: Path) -> None:
        """Opcode by opcode, but for what torch remembers for sharing."""
        torch.save(EVERY, tmp_path / "torch.pt")
        write(tmp_path / "ours.pt", EVERY)

        def ops(path: Path, name: str) -> list[tuple[str, object]]:
            skip = ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINUNICODE")
            tuples = {"TUPLE1": "TUPLE", "TUPLE2": "TUPLE", "TUPLE3": "TUPLE", "EMPTY_TUPLE": "TUPLE"}
            with zipfile.ZipFile(path) as file:
                found = [(op.name, arg) for op, arg, _ in pickletools.genops(file.read(name))]
            return [(tuples.get(op, op), arg) for op, arg in found if op not in (*skip, "MARK")]

        assert ops(tmp_path / "ours.pt", "archive/data.pkl") == ops(tmp_path / "torch.pt", "torch/data.pkl")

    def test_nothing_is_called_but_torch_s_rebuilding(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(write(tmp_path / "x.pt", EVERY)) as file:
            ops = list(pickletools.genops(file.read("archive/data.pkl")))
        names = {str(arg) for op, arg, _ in ops if op.name == "GLOBAL"}
        calls = {name for name in names if not name.endswith("Storage") and not name.startswith("torch ")}
        assert calls == {
            "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_tensor_v3",
            "collections OrderedDict",
        }
        assert {op.proto for op, _, _ in ops} <= {0, 1, 2}


plain = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5)
leaves = plain | st.builds(random_tensor, st.sampled_from(SHAPES), st.sampled_from(list(TYPES)), st.integers(0, 2**32))
keys = st.text(max_size=5) | st.integers(-(2**40), 2**40)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def marked(value: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    """Put a marker in place of every tensor."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return TensorNamed(name)
    if isinstance(value, dict):
        return {key: marked(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(marked(item, tensors) for item in value)
    plain: Tree = value
    return plain


class TestTrees:
    @given(trees)
    def test_torch_gets_back_any_tree(self, tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = [marked(value, tensors)]
        path = write(tmp_path_factory.getbasetemp() / "tree.pt", tensors, tree)
        assert same(torch.load(path, weights_only=True), [value])

    @given(st.dictionaries(st.text(max_size=5), leaves, max_size=5))
    def test_our_reader_gets_back_named_tensors_and_texts(
        self, tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
    ) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = marked(value, tensors)
        path = write(tmp_path_factory.getbasetemp() / "named.pt", tensors, tree)
        source = check(path, flatten(value))
        texts = {key: item for key, item in value.items() if isinstance(item, str)}
        assert {key: source.metadata[key] for key in texts} == texts

    def test_a_lone_tensor_without_a_name(self, tmp_path: Path) -> None:
        tensor = torch.arange(4.0)
        loaded = torch.load(write(tmp_path / "x.pt", {"": tensor}), weights_only=True)
        assert same(loaded, tensor)
        check(tmp_path / "x.pt", {"": tensor})

    @pytest.mark.parametrize(
        ("tree", "says"),
        [
            ({}, "'a': has no place in the tree"),
            ([TensorNamed("a"), TensorNamed("a")], "'a': stands in the tree twice"),
            ({"a": TensorNamed("a"), "x": {1, 2}}, "cannot hold a value of type set"),
            ({"a": TensorNamed("a"), (1, 2): 3}, "cannot hold a value of type tuple"),
            ({"a": TensorNamed("a"), True: 3}, "cannot hold a value of type bool"),
            ({"a": TensorNamed("a"), "x": b"bytes"}, "cannot hold a value of type bytes"),
            ({"a": TensorNamed("a"), "x": 1 << 3000}, "a whole number of over 255 bytes"),
            ({"a": TensorNamed("a"), "x": "\ud800"}, "half a surrogate pair"),
        ],
    )
    def test_what_it_cannot_say(self, tmp_path: Path, tree: Tree, says: str) -> None:
        with pytest.raises(WriteError, match=says):
            TorchZipSink(tmp_path / "x.pt", {"a": Spec((1,), DType.F32)}, tree)
        assert listing(tmp_path) == []

    def test_as_deep_as_the_reader_goes(self, tmp_path: Path) -> None:
        tree: Tree = TensorNamed("a")
        for _ in range(MAX_DEPTH):
            tree = [tree]
        with open_pickle(write(tmp_path / "x.pt", {"a": torch.ones(1)}, tree)) as source:
            assert len(source.specs) == 1
        with pytest.raises(WriteError, match="nested too deeply"):
            write(tmp_path / "x.pt", {"a": torch.ones(1)}, [tree])

    def test_a_type_that_torch_has_not(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match="'a': is of type F6_E2M3, which torch has not; write safetensors"):
            TorchZipSink(tmp_path / "x.pt", {"a": Spec((4,), DType.F6_E2M3)})


class TestBytes:
    def test_they_depend_on_nothing_but_the_content(self, tmp_path: Path) -> None:
        first = write(tmp_path / "a.pt", EVERY).read_bytes()
        jobs = [(name, at, raw(t)[at : at + 13]) for name, t in EVERY.items() for at in range(0, t.nbytes, 13)]
        random.Random(1).shuffle(jobs)
        with TorchZipSink(tmp_path / "other.ckpt", specs_of(EVERY)) as sink:

            def work(part: list[tuple[str, int, bytes]]) -> None:
                for name, at, data in part:
                    sink.write(name, at, memoryview(data))

            threads = [threading.Thread(target=work, args=(jobs[i::4],)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (tmp_path / "other.ckpt").read_bytes() == first

    def test_zip64_in_every_field(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_sink, "_largest", 20)
        path = write(tmp_path / "x.pt", EVERY)
        check(path, EVERY)
        assert same(torch.load(path, weights_only=True), EVERY)
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            assert all(len(info.extra) > 0 for info in file.infolist()[1:])

    def test_more_members_than_plain_zip_can_count(self, tmp_path: Path) -> None:
        members, at = torch_sink._laid_out({f"data/{i}": 0 for i in range(65_536)})
        path = tmp_path / "x.pt"
        path.write_bytes(b"".join(m.local() for m in members.values()) + torch_sink._directory(members, at))
        with zipfile.ZipFile(path) as archive:
            assert len(archive.infolist()) == 65_536
        file = InputFile(path)
        assert len(read_directory(file)) == 65_536
        file.close()

    def test_damage_is_found(self, tmp_path: Path) -> None:
        tensors = {"a": torch.arange(64.0), "b": torch.arange(3.0)}
        path = write(tmp_path / "x.pt", tensors)
        data = bytearray(path.read_bytes())
        data[data.index(raw(tensors["a"])) + 9] ^= 4
        path.write_bytes(data)
        with open_pickle(path) as source:
            source.read("a")
            with pytest.raises(CorruptFile, match="'archive/data/0': has the CRC"):
                source.verify()
