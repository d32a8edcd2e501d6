"""The one door: every file by what it is, never by what it is called, and plain words for what is no model."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import warnings
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from sdformats import files as door
from sdformats.errors import CorruptFile, FormatError, UnknownFormat, UnsupportedFile
from sdformats.files import create_sink, open_source
from sdformats.positional import InputFile
from tests.formats.png.pictures import with_chunks

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
BYTES = np.arange(6, dtype=np.float32).tobytes()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.ckpt"))
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather export; the files are still about
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), buffer)
    return buffer.getvalue()


WHOLE = save({"a": np.arange(6, dtype=np.float32)})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2132625894\n"
NO_MODEL = {
    "lfs pointer": (LFS, UnknownFormat, "git-lfs"),
    "html": (b"<!DOCTYPE html><html><head>", UnknownFormat, "web page"),
    "html after spaces": (b"\n\n  <HTML lang=en>" + bytes(100), UnknownFormat, "web page"),
    "html after a comment": (b"<!-- moved --><html>" + bytes(100), UnknownFormat, "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', UnknownFormat, "XML"),
    "gguf": (b"GGUF\x03" + bytes(100), UnsupportedFile, "GGUF"),
    "empty": (b"", UnknownFormat, "empty"),
    "two bytes": (b"\x0a\x0b", UnknownFormat, "2 bytes"),
    "zeros": (bytes(5000), UnknownFormat, "zeros"),
    "json": (b'{"architectures": ["CLIPTextModel"]}', UnknownFormat, "JSON"),
    "json with a mark in front": (b"\xef\xbb\xbf" + b'{"a": 1}' + b" " * 80, UnknownFormat, "JSON"),
    "json list": (b'[{"file": "x"}]' + b" " * 80, UnknownFormat, "JSON"),
    "png": (with_chunks(), UnsupportedFile, "PNG picture without an embedding"),
    "tar": (tar(), UnsupportedFile, "tar"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), UnsupportedFile, "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), UnsupportedFile, "7z"),
    "text": (b"the quick brown fox jumps over the lazy dog. " * 9, UnknownFormat, "no model file"),
    "plain zip": (archive(readme=b"hello"), UnsupportedFile, "zip"),
    "torchscript": (script(), UnsupportedFile, "TorchScript"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), UnsupportedFile, "HDF5"),
    "safetensors cut in its data": (WHOLE[:-1], CorruptFile, "cut short"),
    "safetensors cut in its header": (struct.pack("<Q", 5000) + b'{"a":{"dtype"', CorruptFile, "cut short"),
    "zip cut short": (archive(m__data=bytes(500))[:300], CorruptFile, "cut short"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model"])
@pytest.mark.parametrize("what", NO_MODEL)
def test_what_is_no_model_is_named(tmp_path: Path, what: str, name: str) -> None:
    data, kind, word = NO_MODEL[what]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert type(caught.value) is kind
    assert word in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.advice or caught.value.expected


def written(path: Path, how: str) -> Path:
    if how == "safetensors":
        save_file({"a": TENSORS["a"].numpy()}, path)
    elif how == "torch-legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(TENSORS, path)
    return path


@pytest.mark.parametrize("how", ["safetensors", "torch-zip", "torch-legacy"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.bin", "m.json", "m.png", "m"])
def test_the_name_decides_nothing(tmp_path: Path, how: str, name: str) -> None:
    with open_source(written(tmp_path / name, how)) as source:
        assert source.container == how
        assert bytes(source.read("a")) == BYTES
        assert source.path == tmp_path / name


@pytest.mark.skipif(os.name == "nt", reason="Windows does not move open files")
@pytest.mark.parametrize("how", ["safetensors", "torch-zip", "torch-legacy"])
def test_a_file_is_opened_once(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counted(InputFile):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(door, "InputFile", Counted)
    path = written(tmp_path / "m", how)
    with open_source(path) as source:
        path.rename(tmp_path / "moved")
        written(path, "safetensors").write_bytes(b"something else")
        assert bytes(source.read("a")) == BYTES
    assert opened == [path]


def test_a_safetensors_file_without_tensors_is_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    with open_source(path) as source:
        assert (source.container, dict(source.specs)) == ("safetensors", {})


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        open_source(tmp_path / "gone.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FormatError, match="does not exist"):
        open_source(tmp_path / "link")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other limits")
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="cannot be read|does not exist"):
        open_source(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        open_source(tmp_path / "pipe")


@given(
    st.binary(max_size=700)
    | st.builds(bytes.__add__, st.sampled_from([WHOLE[:9], b"PK\3\4", b"\x80\2", b"{", LFS]), st.binary(max_size=600))
)
def test_any_bytes_are_a_source_or_a_clean_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        source = open_source(path)
    except FormatError as error:
        said = str(error)
    else:
        said = source.container
        source.close()
    assert said
    assert "\n" not in said


@pytest.mark.parametrize("folder", [False, True])
def test_the_output_is_like_the_input(tmp_path: Path, folder: bool) -> None:
    if folder:
        where = tmp_path / "in" / "unet"
        where.mkdir(parents=True)
        (tmp_path / "in" / "model_index.json").write_text(json.dumps({}))
        written(where / "diffusion_pytorch_model.safetensors", "safetensors")
    else:
        written(tmp_path / "in", "torch-zip")
    out = tmp_path / "out"
    with open_source(tmp_path / "in") as source, create_sink(out, source.specs, {}, like=source) as sink:
        for name in source.specs:
            sink.write(name, 0, memoryview(source.read(name)))
    with open_source(out) as again:
        assert again.container == ("folder" if folder else "safetensors")
        assert [bytes(again.read(name)) for name in again.specs] == [BYTES]
