"""Pickled tensors: files that ``torch.save`` or ``pickle.dump`` wrote. Nothing in them is ever run.

::

    torch-zip      a zip file: ROOT/data.pkl says what there is, ROOT/data/KEY are the storages
    torch-legacy   five pickles, then the storages (see `torchlegacy`)
    pickle         one pickle with everything inside

The pickle is read by a machine of our own that only builds data (`opcodes`, `rebuild`), every tensor is checked against its
storage before the file counts as open, and then tensors are plain ranges of bytes in the file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.contents import sort_out
from sdformats.errors import FormatError, UnknownFormat
from sdformats.opcodes import Machine
from sdformats.pickle_stream import MAX_PICKLE, Budget, Stream
from sdformats.place import Place
from sdformats.positional import InputFile
from sdformats.rebuild import Rebuild, Storage, StorageId
from sdformats.records import DeflatedRecord, MemoryRecord, Recent, Record, Span, StoredRecord, inflate
from sdformats.strided import gather
from sdformats.tensor import TensorSource
from sdformats.torchlegacy import MAGIC, loader, read_legacy
from sdformats.torchzip import STORED, Member, explain_other_zip, looks_like_zip, read_directory

if TYPE_CHECKING:
    from sdformats.contents import Content
    from sdformats.strided import TensorRef

_GROWTH = 4
_ALLOWANCE = 64 << 20


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins with these bytes (9 or more) can be a pickle of protocol 2 or later.

    The length in front of a safetensors header can begin with the same two bytes; that is told apart.
    """
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[4:9] != b"\0\0\0\0{" and head[2] != 0


def open_pickle(file: Path | InputFile, *, limit: int | None = None) -> PickleSource:
    """Open a file that ``torch.save`` or ``pickle.dump`` wrote. See `PickleSource`."""
    return PickleSource(file, limit=limit)


class PickleSource(TensorSource):
    """Pickled tensors, read at offsets. See `contents` for what counts as a tensor and how it is named.

    Args:
        file: the file, or its path. The source owns it from here on and closes it.
        limit: bytes that all tensors together may have when they are written out; by default four times the file and
            64 MiB. A small file can claim to hold far more, by showing the same bytes again and again.

    Raises:
        UnknownFormat: the file is no pickle and no zip file.
        CorruptFile, UnsafeFile, UnsupportedFile: it is broken, hostile, or holds something that is not read.
    """

    def __init__(self, file: InputFile | Path | str, *, limit: int | None = None) -> None:
        opened = file if isinstance(file, InputFile) else InputFile(Path(file))
        self.path = opened.path
        self.files = (opened,)
        self._recent = Recent()
        self._limit = _GROWTH * opened.size + _ALLOWANCE if limit is None else limit
        try:
            reader = _Reader(opened, self._recent, self._limit)
            content = reader.read()
            self._check_total(content)
        except BaseException:
            opened.close()
            raise
        self.container = reader.container
        self._records = tuple(reader.records)
        self._take(content)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        place = self._direct.get(name)
        if place is not None:
            record, start = place
            record.read_into(start + offset, buffer)
            return
        ref = self._tensors[name]
        whole = self._recent.get(ref, partial(gather, ref))
        buffer[:] = whole[offset : offset + len(buffer)]

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._tensors[name].span.position

    def verify(self) -> None:
        """See `TensorSource.verify`. Checks the CRC of every member of the zip file from which something was read."""
        for record in self._records:
            record.verify()
        super().verify()

    def close(self) -> None:
        self._recent.clear()
        super().close()

    def _check_total(self, content: Content) -> None:
        total = sum(ref.spec.nbytes for ref in content.tensors.values())
        if total > self._limit:
            raise Place(self.path).unsafe(
                f"is {self.files[0].size:,} bytes long and claims {total:,} bytes of tensors",
                f"at most {self._limit:,}",
            )

    def _take(self, content: Content) -> None:
        ordered = sorted(content.tensors.items(), key=lambda item: item[1].span.position)
        self._tensors: dict[str, TensorRef] = dict(ordered)
        self._direct = {name: (ref.span.record, ref.span.start) for name, ref in ordered if ref.direct}
        self.specs = {name: ref.spec for name, ref in ordered}
        self.metadata = content.metadata
        self.notes = tuple(content.notes)


class _Reader:
    """Reads one file, whichever of the three kinds it is."""

    def __init__(self, file: InputFile, recent: Recent, limit: int) -> None:
        self.container = ""
        self.records: list[Record] = []
        self._file = file
        self._recent = recent
        self._limit = limit
        self._budget = Budget()
        self._members: dict[str, Member] = {}
        self._root = ""
        self._by_name: dict[str, Record] = {}
        self._big_endian = False

    def read(self) -> Content:
        head = self._file.head(262)
        if looks_like_zip(head):
            tree, dropped, place = self._read_zip()
        elif looks_like_pickle(head):
            tree, dropped, place = self._read_stream()
        else:
            raise self._unknown(head)
        content = sort_out(tree, place)
        if dropped:
            content.notes.append(f"left out: attributes of dicts or tensors ({', '.join(sorted(map(ascii, dropped)))})")
        return content

    def _unknown(self, head: bytes) -> FormatError:
        path = self._file.path
        if head[257:262] == b"ustar":
            return Place(path).unsupported(
                "is a tar archive, as the first versions of torch wrote", "a zip file or a pickle"
            )
        return UnknownFormat("is neither a zip file nor a pickle", path=path, expected="what torch.save writes")

    def _read_stream(self) -> tuple[Any, set[str], Place]:
        place = Place(self._file.path)
        span = Span(StoredRecord(self._file, 0, self._file.size), 0, self._file.size)
        stream = Stream(span, place)
        world = Rebuild(place, self._budget, load=loader(place, self._budget))
        tree = Machine(stream, world, self._budget).run()
        if type(tree) is int and tree == MAGIC:
            self.container = "torch-legacy"
            return *read_legacy(stream, span, place, self._budget), place
        self.container = "pickle"
        if stream.left:
            raise place.unsafe(f"has {stream.left:,} bytes after its pickle", "none")
        return tree, world.dropped, place

    def _read_zip(self) -> tuple[Any, set[str], Place]:
        self.container = "torch-zip"
        self._members = read_directory(self._file)
        pickle = self._find_pickle()
        self._root = pickle.name.removesuffix("data.pkl")
        order = self._small("byteorder", b"little")
        if order not in (b"little", b"big"):
            raise Place(self._file.path, self._root + "byteorder").corrupt(f"says {order!r}", "'little' or 'big'")
        self._big_endian = order == b"big"
        place = Place(self._file.path, pickle.name)
        if pickle.size > MAX_PICKLE:
            raise place.unsafe(f"is {pickle.size:,} bytes long", f"at most {MAX_PICKLE:,}")
        data = self._bytes(pickle)
        stream = Stream(Span(MemoryRecord(data, pickle.data), 0, len(data)), place)
        world = Rebuild(place, self._budget, self._storage, loader(place, self._budget), pickle.data)
        tree = Machine(stream, world, self._budget).run()
        if stream.left:
            raise place.unsafe(f"has {stream.left:,} bytes after its pickle", "none")
        return tree, world.dropped, place

    def _find_pickle(self) -> Member:
        names = list(self._members)
        found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) > 1:
            raise Place(self._file.path).unsafe(f"has {len(found)} members named data.pkl", "one")
        root = found[0].removesuffix("data.pkl") if found else ""
        if any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in names):
            raise Place(self._file.path).unsupported(
                "is a TorchScript program", advice="save its state_dict() with torch.save"
            )
        if not found:
            raise explain_other_zip(self._file, names)
        return self._members[found[0]]

    def _small(self, name: str, default: bytes) -> bytes:
        member = self._members.get(self._root + name)
        if member is None:
            return default
        if member.size > 64:
            raise Place(self._file.path, member.name).corrupt(f"is {member.size:,} bytes long", "one word")
        return self._bytes(member)

    def _bytes(self, member: Member) -> bytes:
        """Return all of a member, checked."""
        if member.method != STORED:
            return inflate(self._file, member.data, member.packed, member.size, member.crc, member.name)
        record = StoredRecord(self._file, member.data, member.size, member.crc, member.name)
        data = record.read(0, member.size)
        record.verify()
        return data

    def _storage(self, wanted: StorageId) -> Storage:
        name = f"{self._root}data/{wanted.key}"
        member = self._members.get(name)
        place = Place(self._file.path, name)
        if member is None:
            raise place.corrupt("is missing, though the pickle uses it", advice="download or copy the file again")
        if member.size != wanted.nbytes:
            raise place.corrupt(f"is {member.size:,} bytes long", f"{wanted.nbytes:,}, as the pickle says")
        record = self._by_name.get(name)
        if record is None:
            record = self._record(member, place)
            self._by_name[name] = record
            self.records.append(record)
        return Storage(Span(record, 0, member.size), wanted.dtype, self._big_endian)

    def _record(self, member: Member, place: Place) -> Record:
        if member.method == STORED:
            return StoredRecord(self._file, member.data, member.size, member.crc, member.name)
        if member.size > self._limit:
            raise place.unsafe(f"grows to {member.size:,} bytes", f"at most {self._limit:,}")
        return DeflatedRecord(
            self._file, member.data, member.packed, member.size, member.crc, member.name, self._recent
        )


__all__ = ["PickleSource", "looks_like_pickle", "looks_like_zip", "open_pickle"]
