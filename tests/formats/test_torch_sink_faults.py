"""Files for torch.load under every fault, and by the name of the output."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdformats import output
from sdformats.errors import OutputExists, WriteError
from sdformats.files import create_sink, open_source
from sdformats.pickle import open_pickle
from sdformats.safetensors import SafetensorsSource
from sdformats.tensor import DType, Spec
from sdformats.torch_sink import TorchZipSink
from tests.formats.output_ways import WAYS, failing, listing, posix, pretend
from tests.formats.pickle_oracle import check, write

ROOT = Path(__file__).resolve().parents[2]


class TestFaults:
    def begin(self, path: Path) -> TorchZipSink:
        return TorchZipSink(path, {"a": Spec((4,), DType.F32)}, overwrite=True)

    @pytest.mark.parametrize("blocks", [[], [(0, 8)], [(8, 8)], [(0, 8), (4, 12)], [(0, 16), (8, 4)]])
    def test_a_tensor_that_is_not_whole_is_no_file(self, tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
        sink = self.begin(tmp_path / "x.pt")
        for at, size in blocks:
            sink.write("a", at, memoryview(bytes(size)))
        with pytest.raises(WriteError, match="'a': was not written whole .expected 16 bytes"):
            sink.commit()
        assert listing(tmp_path) == []

    def test_a_block_may_be_written_again(self, tmp_path: Path) -> None:
        with self.begin(tmp_path / "x.pt") as sink:
            for content in (b"\1" * 8, b"\2" * 8):
                sink.write("a", 0, memoryview(content))
            sink.write("a", 8, memoryview(b"\3" * 8))
        with open_pickle(tmp_path / "x.pt") as source:
            assert source.read("a") == b"\2" * 8 + b"\3" * 8
            source.verify()

    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_is_left_of_what_is_not_finished(
        self, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x.pt").write_bytes(b"old")
        with monkeypatch.context() as patch:
            pretend(way, patch)
            with pytest.raises(KeyError), self.begin(tmp_path / "x.pt") as sink:
                sink.write("unknown", 0, memoryview(bytes(16)))
            with self.begin(tmp_path / "y.pt") as sink:
                sink.write("a", 0, memoryview(bytes(16)))
        assert (tmp_path / "x.pt").read_bytes() == b"old"
        assert listing(tmp_path) == ["x.pt", "y.pt"]
        check(tmp_path / "y.pt", {"a": torch.zeros(4)})

    @posix
    @pytest.mark.parametrize("when", ["begin", "write", "commit"])
    @pytest.mark.parametrize("unnamed", [True, False])
    def test_a_full_disk_keeps_the_old_file(
        self, tmp_path: Path, when: str, unnamed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not unnamed:
            monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        (tmp_path / "x.pt").write_bytes(b"old")

        def full_at(reached: str) -> None:
            if reached == when:
                monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))

        def run() -> None:
            full_at("begin")
            with self.begin(tmp_path / "x.pt") as sink:
                full_at("write")
                sink.write("a", 0, memoryview(bytes(16)))
                full_at("commit")

        with pytest.raises(WriteError, match="the disk is full"):
            run()
        assert (tmp_path / "x.pt").read_bytes() == b"old"
        assert listing(tmp_path) == ["x.pt"]

    def test_too_little_room_is_told_before_anything_is_created(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
        with pytest.raises(WriteError, match="and 99 are free"):
            self.begin(tmp_path / "x.pt")
        assert listing(tmp_path) == []

    def test_nothing_is_replaced_unasked(self, tmp_path: Path) -> None:
        (tmp_path / "x.pt").write_bytes(b"old")
        with pytest.raises(OutputExists, match="exists already"):
            TorchZipSink(tmp_path / "x.pt", {"a": Spec((4,), DType.F32)})
        assert (tmp_path / "x.pt").read_bytes() == b"old"

    @posix
    @pytest.mark.parametrize("kind", ["unnamed", "named"])
    def test_a_killed_writer_leaves_the_old_file(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "x.pt").write_bytes(b"old")
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "formats")}
        started = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "x.pt"), kind], env=environment, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "half\n"
        started.send_signal(signal.SIGKILL)
        started.communicate(timeout=60)
        assert (tmp_path / "x.pt").read_bytes() == b"old"
        check(write(tmp_path / "x.pt", {"a": torch.ones(4)}), {"a": torch.ones(4)})
        assert listing(tmp_path) == ["x.pt"]


KILLED = """
import os, sys, time
from pathlib import Path
from sdformats.tensor import DType, Spec
from sdformats.torch_sink import TorchZipSink
if sys.argv[2] == "named":
    vars(os).pop("O_TMPFILE", None)
sink = TorchZipSink(Path(sys.argv[1]), {"a": Spec((4,), DType.F32)}, overwrite=True)
sink.write("a", 0, memoryview(bytes(8)))
print("half", flush=True)
time.sleep(300)
"""


METADATA = {"modelspec.title": "ünï", "state": "x"}


class TestByName:
    """create_sink picks the container by the output's name."""

    def write(self, path: Path) -> Path:
        tensors = {"m.w": torch.arange(6.0).reshape(2, 3), "m.b": torch.ones(2, dtype=torch.bfloat16)}
        like = write(path.with_name("like.pth"), tensors)
        with open_source(like) as source, create_sink(path, source.specs, METADATA, like=source) as sink:
            for name in source.specs:
                sink.write(name, 0, memoryview(source.read(name)))
        check(path, tensors)
        return path

    @pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.CKPT"])
    def test_a_training_checkpoint(self, tmp_path: Path, name: str) -> None:
        loaded = torch.load(self.write(tmp_path / name), weights_only=True)
        assert list(loaded) == ["modelspec.title", "state", "state_dict"]
        assert list(loaded["state_dict"]) == ["m.w", "m.b"]
        with open_source(tmp_path / name) as source:
            assert source.metadata == METADATA
            assert source.notes == ()

    @pytest.mark.parametrize("name", ["x.bin", "x.pth"])
    def test_a_bare_dict(self, tmp_path: Path, name: str) -> None:
        assert list(torch.load(self.write(tmp_path / name), weights_only=True)) == ["m.w", "m.b"]

    @pytest.mark.parametrize("name", ["x.safetensors", "x", "x.zip"])
    def test_everything_else_is_safetensors(self, tmp_path: Path, name: str) -> None:
        like = write(tmp_path / "like.pth", {"a": torch.ones(2)})
        with open_source(like) as source, create_sink(tmp_path / name, source.specs, {}, like=source) as sink:
            sink.write("a", 0, memoryview(source.read("a")))
        SafetensorsSource(tmp_path / name).close()
