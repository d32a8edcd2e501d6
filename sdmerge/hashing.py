"""The hashes by which model files are known."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.safetensors import SafetensorsSource, layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdformats.positional import InputFile
    from sdformats.safetensors import SafetensorsSink
    from sdformats.tensor import TensorSource

CHUNK = 1 << 20
_LEGACY_AT, _LEGACY_SIZE = 0x100000, 0x10000


@dataclass(frozen=True)
class Hashes:
    """A file's hashes, in lower-case hex.

    Attributes:
        sha256: of the whole file; None for a folder.
        autov2: its first 10 digits.
        autov3: first 12 digits of the sha256 of the bytes after the header; safetensors only.
        legacy: first 8 digits of the sha256 of 64 KiB at 1 MiB, A1111's old model hash.
        tensors: of the tensors alone, see `tensor_hash`.
    """

    sha256: str | None
    autov2: str | None
    autov3: str | None
    legacy: str | None
    tensors: str


def hashes(source: TensorSource, progress: Callable[[int], None] = lambda _: None) -> Hashes:
    """Return every hash that a source has.

    Args:
        source: an open source.
        progress: called with the number of bytes hashed since the last call; from several threads.

    Raises:
        FormatError: the file cannot be read, changed, or fails its checksums.
    """
    alone = _is_one_file(source)
    with ThreadPoolExecutor(1) as pool:
        inner = pool.submit(tensor_hash, source, progress)
        whole, rest = _file_hashes(source, progress) if alone else (None, None)
        tensors = inner.result()
    source.verify()
    return Hashes(
        sha256=whole,
        autov2=whole[:10] if whole else None,
        autov3=rest[:12] if rest else None,
        legacy=legacy(source.files[0]) if alone else None,
        tensors=tensors,
    )


def cost(source: TensorSource) -> int:
    """Return the number of bytes that `hashes` goes through."""
    tensors = sum(spec.nbytes for spec in source.specs.values())
    return tensors + (source.files[0].size if _is_one_file(source) else 0)


def _is_one_file(source: TensorSource) -> bool:
    return source.container not in ("folder", "sharded")


def sha256(file: InputFile) -> str:
    """Return the sha256 of a whole file, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for offset in range(0, file.size, CHUNK):
        part = buffer[: min(CHUNK, file.size - offset)]
        file.read_into(offset, part)
        digest.update(part)
    return digest.hexdigest()


def legacy(file: InputFile) -> str:
    """Return A1111's old model hash: 64 KiB at 1 MiB; what of that lies beyond a short file's end counts as nothing."""
    size = max(0, min(_LEGACY_SIZE, file.size - _LEGACY_AT))
    return hashlib.sha256(file.read(_LEGACY_AT, size)).hexdigest()[:8]


SD_SCRIPTS = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
"""The hashes that sd-scripts writes into an adapter's metadata, before they are known."""


def sd_scripts(file: SafetensorsSink) -> dict[str, str]:
    """Return sd-scripts' hashes of an adapter that is all written: of its tensors' bytes, and the legacy one.

    The legacy one is that of a file with no other texts than those of training (``ss_*``): others may be changed later.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for offset in range(file.data_start, file.size, CHUNK):
        part = buffer[: min(CHUNK, file.size - offset)]
        file.read_into(offset, part)
        digest.update(part)
    header, _ = layout(file.specs, {key: text for key, text in file.metadata.items() if key.startswith("ss_")})
    inside = header[_LEGACY_AT : _LEGACY_AT + _LEGACY_SIZE]
    start = max(0, _LEGACY_AT - len(header)) + file.data_start
    rest = memoryview(bytearray(max(0, min(_LEGACY_SIZE - len(inside), file.size - start))))
    file.read_into(start, rest)
    old = hashlib.sha256(inside + rest).hexdigest()[:8]
    return {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": old}


def tensor_hash(source: TensorSource, progress: Callable[[int], None] = lambda _: None) -> str:
    """Return the sha256 over the tensors alone: the same for any container and any order of the file.

    For each tensor, sorted by the UTF-8 bytes of its name: ``n : name NUL dtype NUL d0,d1,… LF`` without the spaces (n is the
    length of the name in bytes, in decimal; dtype as safetensors calls it; dimensions in decimal), then its bytes,
    little-endian and contiguous. With the length in front no name, whatever is in it, can pass for another tensor's bytes.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for name in sorted(source.specs, key=lambda name: name.encode()):
        spec = source.specs[name]
        said = name.encode()
        digest.update(b"%d:%s" % (len(said), said))
        digest.update(f"\0{spec.dtype}\0{','.join(map(str, spec.shape))}\n".encode())
        for offset in range(0, spec.nbytes, CHUNK):
            part = buffer[: min(CHUNK, spec.nbytes - offset)]
            source.read_into(name, offset, part)
            digest.update(part)
            progress(len(part))
    return digest.hexdigest()


def _file_hashes(source: TensorSource, progress: Callable[[int], None]) -> tuple[str, str | None]:
    """Return the sha256 of the file and, for safetensors, of what follows its header, in one read."""
    file = source.files[0]
    start = source.data_start if isinstance(source, SafetensorsSource) else None
    whole, rest = hashlib.sha256(), hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    offset = 0
    while offset < file.size:
        border = start if start is not None and offset < start else file.size
        part = buffer[: min(CHUNK, border - offset)]
        file.read_into(offset, part)
        whole.update(part)
        if start is not None and offset >= start:
            rest.update(part)
        offset += len(part)
        progress(len(part))
    return whole.hexdigest(), rest.hexdigest() if start is not None else None
