"""torch's format before it used zip files.

::

    pickle    the magic number 0x1950a86a20f9469cfc6c
    pickle    the version of the format, 1001
    pickle    {"protocol_version", "little_endian", "type_sizes"}
    pickle    the object; its tensors refer to storages by key
    pickle    list of keys
    storages  in the order of the keys: number of elements (8 bytes, little-endian), then the elements

The end of each storage follows from its length, and only the pickle knows how wide the elements are. So the keys must be
exactly those that the pickle uses, and the last storage must end where the file ends.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from sdformats.opcodes import Machine
from sdformats.pickle_stream import Budget, Stream
from sdformats.place import Mismatch
from sdformats.rebuild import Rebuild, Storage, StorageId
from sdformats.records import Record, Span
from sdformats.strided import whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdformats.place import Place

MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = struct.Struct("<q")


class LateRecord(Record):
    """A record whose place is known only after the pickle that refers to it was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0
        self._record: Record
        self._start = 0

    def put(self, span: Span) -> None:
        """Say where it is."""
        self._record, self._start, self.position = span.record, span.start, span.position
        self.resident = span.record.resident

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._record.read_into(self._start + offset, buffer)


class _Storages:
    """The storages that the pickle refers to, by key."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.used: dict[str, tuple[StorageId, LateRecord]] = {}

    def __call__(self, wanted: StorageId) -> Storage:
        known = self.used.get(wanted.key)
        if known is None:
            known = wanted, LateRecord(wanted.nbytes)
            self.used[wanted.key] = known
        first, record = known
        if (first.dtype, first.count) != (wanted.dtype, wanted.count):
            raise self._place.corrupt(f"describes the storage {wanted.key!r} in two ways")
        span = Span(record, 0, record.size)
        if wanted.view is not None:
            span = self._part(span, wanted)
        return Storage(span, wanted.dtype)

    def _part(self, span: Span, wanted: StorageId) -> Span:
        """A storage that is a part of another, as the first versions of torch had them."""
        if not isinstance(wanted.view, tuple) or len(wanted.view) != 3:
            raise Mismatch
        offset, count = whole(wanted.view[1]), whole(wanted.view[2])
        if offset + count > wanted.count:
            raise self._place.corrupt(f"takes a part beyond the end of the storage {wanted.key!r}")
        return span.part(offset * wanted.itemsize, count * wanted.itemsize)


def read_legacy(stream: Stream, span: Span, place: Place, budget: Budget) -> tuple[Any, set[str]]:
    """Read what follows the magic number.

    Args:
        stream: after the first pickle of `span`.
        span: the whole of the file, or of a byte string that holds such a file.
        place: for errors.
        budget: shared by all pickles of the file.

    Returns:
        What the pickle says, and the attributes that were dropped.

    Raises:
        CorruptFile, UnsafeFile, UnsupportedFile: as everywhere.
    """
    storages = _Storages(place)
    world = Rebuild(place, budget, storages, position=span.position)
    plain = Rebuild(place, budget)
    version = Machine(stream, plain, budget).run()
    if type(version) is not int or version != _VERSION:
        raise place.unsupported("is of an unknown version of torch's old format", str(_VERSION))
    system = Machine(stream, plain, budget).run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise place.unsupported("was written on a big-endian machine in torch's old format")
    content = Machine(stream, world, budget).run()
    keys = Machine(stream, plain, budget).run()
    _find_storages(span, stream.at, keys, storages.used, place)
    return content, world.dropped


def _find_storages(
    span: Span, at: int, keys: object, used: dict[str, tuple[StorageId, LateRecord]], place: Place
) -> None:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise place.corrupt("has a malformed list of storages", "each key once")
    if set(keys) != used.keys():
        odd = sorted(set(keys) ^ used.keys())[0]
        fault = "lists the storage {!r}, which nothing uses" if odd in keys else "lacks the storage {!r}, which is used"
        raise place.corrupt(fault.format(odd[:80]), "exactly those that are used")
    for key in keys:
        wanted, record = used[key]
        if at + _COUNT.size + wanted.nbytes > span.size:
            raise place.corrupt(f"is cut short in the storage {key!r}", advice="download or copy it again")
        (count,) = _COUNT.unpack(span.read(at, _COUNT.size))
        if count != wanted.count:
            raise place.corrupt(f"has {count:,} elements in the storage {key!r}", f"{wanted.count:,}")
        at += _COUNT.size
        record.put(span.part(at, wanted.nbytes))
        at += wanted.nbytes
    if at != span.size:
        raise place.corrupt(f"has {span.size - at:,} bytes after its last storage", "none")


def loader(place: Place, budget: Budget) -> Callable[[Span], Storage]:
    """Return a function that reads a storage from a byte string, as a plain pickle of a tensor holds it.

    Raises:
        CorruptFile: the function does, where the bytes are no storage.
    """

    def load(span: Span) -> Storage:
        if span.record.resident:
            budget.spend_bytes(span.size, place)
        stream = Stream(span, place)
        if Machine(stream, Rebuild(place, budget), budget).run() != MAGIC:
            raise place.corrupt("holds a byte string that is no storage")
        storage, _ = read_legacy(stream, span, place, budget)
        if not isinstance(storage, Storage):
            raise place.corrupt("holds a byte string that is no storage")
        return storage

    return load
