"""The safetensors container.

::

    8 bytes   N, the header's length, little-endian unsigned
    N bytes   JSON object: name → {"dtype": …, "shape": […], "data_offsets": [begin, end]}, UTF-8, padded with spaces;
              "__metadata__" → object of strings
    the rest  the tensors' bytes; the offsets count from here, without holes or overlaps

The header is checked completely before any tensor is read. The check is stricter than the usual reader: a name may stand
in it only once (also when one spelling is escaped), and every byte of the file belongs to exactly one tensor.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile, WriteError
from sdformats.output import PendingFile
from sdformats.positional import InputFile
from sdformats.tensor import DType, Spec, TensorSink, TensorSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_HEADER = 100_000_000
"""Longest header in bytes that is read or written; the reference implementation's limit."""
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST = 2**63 - 1


class SafetensorsSource(TensorSource):
    """A safetensors file, read at offsets.

    Args:
        file: the file, or its path. The source owns it from here on and closes it.

    Raises:
        CorruptFile: the header breaks a rule of the format; the message says which, and where.
    """

    container = "safetensors"

    def __init__(self, file: InputFile | Path | str) -> None:
        opened = file if isinstance(file, InputFile) else InputFile(Path(file))
        self.path = opened.path
        self.files = (opened,)
        try:
            self._start, header = _read_header(opened)
            self.metadata = _metadata(header, opened.path)
            self._spans = _spans(header, opened.path, opened.size - self._start)
        except BaseException:
            opened.close()
            raise
        self.specs = {name: spec for name, (spec, _) in self._spans.items()}

    @property
    def data_start(self) -> int:
        """Offset in the file of the first byte after the header."""
        return self._start

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.files[0].read_into(self._start + self._spans[name][1] + offset, buffer)

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._start + self._spans[name][1]

    def extent(self, name: str) -> tuple[int, int] | None:
        descriptor = self.files[0].descriptor
        return None if descriptor is None else (descriptor, self.position(name)[1])


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether the first 9 bytes of a file of `size` bytes can begin a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and _LENGTH.unpack(head[:8])[0] <= min(size - 8, MAX_HEADER)


def _read_header(file: InputFile) -> tuple[int, dict[str, Any]]:
    if file.size < 8:
        raise CorruptFile(
            f"is {file.size} bytes long", path=file.path, expected="a safetensors file of at least 10 bytes"
        )
    (length,) = _LENGTH.unpack(file.head(8))
    if length > MAX_HEADER:
        raise CorruptFile(
            f"says its header is {length:,} bytes long", path=file.path, expected=f"at most {MAX_HEADER:,}"
        )
    if length > file.size - 8:
        raise CorruptFile(
            f"ends within its header of {length:,} bytes",
            path=file.path,
            advice="the file was cut short: download or copy it again",
        )
    raw = file.read(8, length)
    if raw[:1] != b"{":
        raise CorruptFile("has a header that is no JSON object", path=file.path, expected="'{' at byte 8")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CorruptFile(f"has a header that is not UTF-8 (byte {8 + error.start})", path=file.path) from error
    except _Duplicate as error:
        raise CorruptFile(
            "stands twice in the header", path=file.path, key=str(error), expected="each name once"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"has a header that is not valid JSON: {error}", path=file.path) from error
    return 8 + length, header


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Duplicate(name)
            seen.add(name)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    found = header.pop(_METADATA, {})
    if not isinstance(found, dict):
        raise CorruptFile("is no object", path=path, key=_METADATA, expected="an object of strings")
    for key, value in found.items():
        if not isinstance(value, str):
            raise CorruptFile(f"has no string under {key!r}", path=path, key=_METADATA, expected="an object of strings")
        if not (_is_text(key) and _is_text(value)):
            raise CorruptFile(f"holds half a surrogate pair under {key!r}", path=path, key=_METADATA)
    return found


def _is_text(value: str) -> bool:
    """Whether a string from JSON is Unicode text: an escape there can spell half a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _spans(header: dict[str, Any], path: Path, size: int) -> dict[str, tuple[Spec, int]]:
    """Check every entry and that together they tile the `size` bytes after the header; order them by offset."""
    entries = [(name, *_entry(name, value, path)) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry[2], entry[3]))
    end = 0
    for name, _, begin, stop in entries:
        if begin != end:
            fault = "leaves a hole of" if begin > end else "overlaps its neighbour by"
            raise CorruptFile(
                f"{fault} {abs(begin - end):,} bytes", path=path, key=name, expected=f"to begin at {end:,}"
            )
        end = stop
    if end != size:
        fault = f"has {size - end:,} bytes after its last tensor" if end < size else "is cut short"
        advice = None if end < size else "download or copy it again"
        raise CorruptFile(fault, path=path, expected=f"{end:,} bytes of tensors, found {size:,}", advice=advice)
    return {name: (spec, begin) for name, spec, begin, _ in entries}


def _entry(name: str, value: Any, path: Path) -> tuple[Spec, int, int]:
    if not _is_text(name):
        raise CorruptFile("is no valid name (half a surrogate pair)", path=path, key=name)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise CorruptFile("has a malformed entry", path=path, key=name, expected="dtype, shape and data_offsets")
    dtype = DType.__members__.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        found = f": {value['dtype']!r}" if isinstance(value["dtype"], str) else " that is no text"
        raise CorruptFile(f"has an unknown type{found}", path=path, key=name, expected="one of safetensors' types")
    shape = _integers(value["shape"], name, "shape", path)
    offsets = _integers(value["data_offsets"], name, "data_offsets", path)
    bits = dtype.bits
    for length in shape:
        bits *= length
        if bits > 8 * _LARGEST:
            raise CorruptFile("has more elements than fit in any file", path=path, key=name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFile(f"has the offsets {list(offsets)}", path=path, key=name, expected="[begin, end]")
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        held = f"{offsets[1] - offsets[0]:,} bytes"
        raise CorruptFile(f"has {held} for {dtype} {list(shape)}", path=path, key=name, expected=f"{bits / 8:,.10g}")
    return Spec(shape, dtype), offsets[0], offsets[1]


def _integers(value: Any, name: str, field: str, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= _LARGEST for v in value):
        raise CorruptFile(f"has a malformed {field}", path=path, key=name, expected="a list of whole numbers from 0 on")
    return tuple(value)


class SafetensorsSink(TensorSink):
    """A safetensors file being written: laid out from `specs` first, then filled in any order by any thread.

    Tensors are laid out from the widest element type to the narrowest, so that each starts at a multiple of its own
    width, and within one type in the order of `specs`.

    Args:
        path: where the output will be. A symbolic link is written through.
        specs: every tensor that will be written.
        metadata: texts for the header.
        overwrite: whether an existing file may be replaced.
        seal: called when every tensor is written, with the sink, to be read; returns texts that replace those of the same
            names and lengths, such as a digest of the tensors.

    Raises:
        OutputExists, WriteError: before anything is created.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        *,
        overwrite: bool = False,
        seal: Callable[[SafetensorsSink], Mapping[str, str]] | None = None,
    ) -> None:
        self.path, self.specs, self.metadata = path, specs, metadata
        self._seal = seal
        _check_writable(path, specs, metadata)
        header, self._offsets = layout(specs, metadata)
        if len(header) > 8 + MAX_HEADER:
            raise WriteError(f"needs a header of {len(header):,} bytes", path=path, expected=f"at most {MAX_HEADER:,}")
        self.data_start = len(header)
        self.size = len(header) + sum(spec.nbytes for spec in specs.values())
        self._file = PendingFile(path, self.size, overwrite=overwrite)
        try:
            self._file.write(0, memoryview(header))
        except BaseException:
            self._file.abort()
            raise

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        self._file.write(self._offsets[name] + offset, buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file, as far as it is written."""
        self._file.read_into(offset, buffer)

    def commit(self) -> None:
        if self._seal is not None:
            try:
                header, _ = layout(self.specs, {**self.metadata, **self._seal(self)})
                assert len(header) == self.data_start, "sealed with texts of other lengths"
                self._file.write(0, memoryview(header))
            except BaseException:
                self.abort()
                raise
        self._file.commit()

    def abort(self) -> None:
        self._file.abort()


def _check_writable(path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
    """Refuse what a safetensors file cannot say."""
    for name, spec in specs.items():
        if name == _METADATA or not _is_text(name):
            raise WriteError("is no name that a safetensors file can hold", path=path, key=name)
        if spec.numel * spec.dtype.bits % 8:
            raise WriteError(f"fills no whole number of bytes as {spec}", path=path, key=name)
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            raise WriteError(f"holds half a surrogate pair under {key!r}", path=path, key=_METADATA)


def layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the first tensor, and each tensor's offset in the file."""
    ordered: Sequence[str] = sorted(specs, key=lambda name: -specs[name].dtype.bits)
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name in ordered:
        spec = specs[name]
        offsets[name] = end
        end += spec.nbytes
        entries[name] = {"dtype": spec.dtype.name, "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = _LENGTH.pack(len(text)) + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
