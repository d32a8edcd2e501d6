"""One door for every file: what it is decides, never what it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.errors import FormatError, UnknownFormat, UnsupportedFile
from sdformats.folder import FolderSource, open_folder, open_index
from sdformats.folder_sink import FolderSink
from sdformats.pickle import looks_like_pickle, open_pickle
from sdformats.png import SIGNATURE, PngSource
from sdformats.positional import InputFile
from sdformats.safetensors import SafetensorsSink, SafetensorsSource, looks_like_safetensors
from sdformats.torch_pickle import flat
from sdformats.torch_sink import SUFFIXES as TORCH_SUFFIXES
from sdformats.torch_sink import TorchZipSink
from sdformats.torchzip import looks_like_zip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdformats.tensor import Spec, TensorSink, TensorSource

_HEAD = 512
_SMALLEST = 64
_LFS_ADVICE = "fetch the file itself with `git lfs pull`, or download it from its page"
_PAGE_ADVICE = "the download went wrong: log in, or use the file's own link"
_NAMED = (
    (b"version https://git-lfs", UnknownFormat, "is a git-lfs pointer, not the model", _LFS_ADVICE),
    (b"<!doctype", UnknownFormat, "is a web page", _PAGE_ADVICE),
    (b"<html", UnknownFormat, "is a web page", _PAGE_ADVICE),
    (b"<!--", UnknownFormat, "is a web page", _PAGE_ADVICE),
    (b"<?xml", UnknownFormat, "is an XML page", _PAGE_ADVICE),
    (b"{", UnknownFormat, "is JSON, not a model", "give the weights, not their config"),
    (b"[", UnknownFormat, "is JSON, not a model", "give the weights, not their config"),
    (b"GGUF", UnsupportedFile, "is a GGUF file (quantised weights)", "use the safetensors it was made from"),
    (b"\x89PNG", UnknownFormat, "begins as a PNG picture and is none", "download or copy it again"),
    (b"\x89HDF", UnsupportedFile, "is an HDF5 file", "use the safetensors or .ckpt of the model"),
    (b"\x1f\x8b", UnsupportedFile, "is compressed with gzip", "unpack it first"),
    (b"7z\xbc\xaf", UnsupportedFile, "is a 7z archive", "unpack it first"),
    (b"Rar!", UnsupportedFile, "is a RAR archive", "unpack it first"),
    (b"%PDF", UnknownFormat, "is a PDF", "choose a model file"),
    (b"\x08\x07onnx", UnsupportedFile, "is an ONNX file", "use the safetensors of the model"),
)


def open_source(path: Path) -> TensorSource:
    """Open a model file, a diffusers folder, a sharded set or its index, whatever it is called.

    The bytes that are looked at are the bytes that are parsed: a file is opened once.

    Raises:
        UnknownFormat: it is no model; the message says what it is and what to do.
        UnsupportedFile: it is recognised, but not read here.
        CorruptFile, UnsafeFile: it is broken, or would run code.
        FormatError: it does not exist or cannot be read.
    """
    try:
        if path.is_dir():
            return open_folder(path, open_source)
        return _open_file(path, _open)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from error


def create_sink(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, like: TensorSource, overwrite: bool = False
) -> TensorSink:
    """Begin an output: a diffusers folder where `like` is one, else one file, of the container that its name asks for.

    ``.ckpt`` and ``.pt`` become torch's zip file, in the form of a training checkpoint: the tensors under ``state_dict``,
    the metadata beside it (but a lone tensor without a name stays alone). ``.bin`` and ``.pth`` become the bare dict of
    tensors that their readers expect, which has no place for metadata. Every other name becomes safetensors.

    Raises:
        OutputExists, WriteError: before anything is created.
    """
    if isinstance(like, FolderSource):
        return FolderSink(path, specs, metadata, like.path, overwrite=overwrite)
    suffix = path.suffix.lower()
    if suffix not in TORCH_SUFFIXES:
        return SafetensorsSink(path, specs, metadata, overwrite=overwrite)
    trainer = suffix in (".ckpt", ".pt") and "" not in specs
    tree = {**metadata, "state_dict": flat(specs)} if trainer else None
    return TorchZipSink(path, specs, tree, overwrite=overwrite)


def _open_file(path: Path, parse: Callable[[InputFile], TensorSource]) -> TensorSource:
    if not path.exists():
        raise FormatError("does not exist", path=path)
    if not path.is_file():
        raise FormatError("is neither a file nor a folder", path=path)
    file = InputFile(path)
    try:
        return parse(file)
    except BaseException:
        file.close()
        raise


def _open(file: InputFile) -> TensorSource:
    head = file.head(_HEAD)
    if head.lstrip()[:1] == b"{" and b"weight_map" in head + file.head(1 << 16):
        file.close()
        return open_index(file.path, _open_shard)
    return _open_weights(file)


def _open_shard(path: Path) -> TensorSource:
    """Open a file that an index names. It holds tensors: an index that names an index might name itself."""
    return _open_file(path, _open_weights)


def _open_weights(file: InputFile) -> TensorSource:
    head = file.head(_HEAD)
    if looks_like_safetensors(head[:9], file.size):
        return SafetensorsSource(file)
    if looks_like_zip(head) or looks_like_pickle(head):
        return open_pickle(file)
    if head.startswith(SIGNATURE):
        return PngSource(file)
    if head[8:9] == b"{" and head[3:8] == bytes(5):  # a safetensors header that its file does not hold
        return SafetensorsSource(file)
    raise _explain(file, head)


def _explain(file: InputFile, head: bytes) -> FormatError:
    """Say what a file is that is no model, and what to do."""
    path = file.path
    if file.size == 0:
        return UnknownFormat("is empty", path=path, advice="download or copy it again")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, kind, problem, advice in _NAMED:
        if text.startswith(mark.lower()):
            return kind(problem, path=path, advice=advice)
    if head[257:262] == b"ustar":
        return UnsupportedFile(
            "is a tar archive", path=path, advice="archives are never unpacked here: unpack it yourself"
        )
    if file.size < _SMALLEST:
        return UnknownFormat(f"is only {file.size} bytes long and no model", path=path, advice="download it again")
    if not any(head):
        return UnknownFormat("begins with zeros", path=path, advice="the download did not finish: download it again")
    return UnknownFormat(
        "is no model file that is known here", path=path, expected="safetensors, a .ckpt/.pt/.bin or a diffusers folder"
    )
