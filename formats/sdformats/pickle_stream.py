"""The bytes of a pickle, taken in order, and what reading it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdformats.errors import FormatError
    from sdformats.place import Place
    from sdformats.records import Span

MAX_PICKLE = 64 << 20
"""Longest pickle in bytes, not counting the large byte strings of one that lies in a file of its own."""
MAX_STEPS = 2_000_000
MAX_WIDE_KEYS = 10_000
"""Dict keys that are whole numbers past 32 bits. Python's hash of them is known, so many could be made to collide."""
_LARGE = 4096
"""Byte strings of this length and over are not read, but referred to, where the pickle lies in a file."""
_CHUNK = 1 << 16


@dataclass(slots=True)
class Budget:
    """What all pickles of one file may cost together."""

    steps: int = MAX_STEPS
    wide_keys: int = MAX_WIDE_KEYS
    copied: int = MAX_PICKLE

    def spend_steps(self, count: int, place: Place) -> None:
        """Take off `count` opcodes, or as much work.

        Raises:
            UnsafeFile: that is more than there is left.
        """
        self.steps -= count
        if self.steps < 0:
            raise place.unsafe("has a pickle of too many steps", f"at most {MAX_STEPS:,}")

    def spend_bytes(self, count: int, place: Place) -> None:
        """Take off `count` bytes that are copied within the pickle.

        Raises:
            UnsafeFile: that is more than there is left.
        """
        self.copied -= count
        if self.copied < 0:
            raise place.unsafe("has a pickle that grows when it is read", f"at most {MAX_PICKLE:,} bytes")

    def spend_wide_key(self, place: Place) -> None:
        """Take off one dict key past 32 bits.

        Raises:
            UnsafeFile: there is none left.
        """
        self.wide_keys -= 1
        if self.wide_keys < 0:
            raise place.unsafe("has too many large numbers as dict keys", f"at most {MAX_WIDE_KEYS:,}")


class Stream:
    """The bytes of a span, taken from its start on, in chunks where the span lies in a file."""

    def __init__(self, span: Span, place: Place) -> None:
        self._span = span
        self._place = place
        self._resident = span.record.resident
        self._buffer = span.read(0, span.size) if self._resident else b""
        self._base = 0
        self._at = 0
        self._budget = MAX_PICKLE

    @property
    def at(self) -> int:
        """Bytes taken so far."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return self._span.size - self.at

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        end = self._at + count
        if end > len(self._buffer):
            self._fill(count)
            end = count
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def line(self, limit: int = 256) -> bytes:
        """Return the bytes before the next line feed, and take that too."""
        line = bytearray()
        while (byte := self.take(1)) != b"\n":
            line += byte
            if len(line) > limit:
                raise self._place.corrupt(f"has a line of over {limit} bytes at byte {self.at:,} of its pickle")
        return bytes(line)

    def take_large(self, count: int) -> bytes | Span:
        """Return the next `count` bytes, or where they are if they are many and lie in a file."""
        if self._resident or count < _LARGE:
            return self.take(count)
        if count > self.left:
            raise self._ended()
        part = self._span.part(self.at, count)
        self._base, self._at, self._buffer = self.at + count, 0, b""
        return part

    def _fill(self, count: int) -> None:
        if count > self.left:
            raise self._ended()
        size = min(max(count, _CHUNK), self.left)
        self._budget -= size
        if self._budget < 0:
            raise self._place.unsafe(
                "has a pickle that is too long", f"at most {MAX_PICKLE:,} bytes beside its tensors"
            )
        self._base += self._at
        self._buffer = self._span.read(self._base, size)
        self._at = 0

    def _ended(self) -> FormatError:
        problem = f"has a pickle that is cut short at byte {self.at:,}"
        return self._place.corrupt(problem, advice="download or copy the file again")
