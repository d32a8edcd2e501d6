"""Where a fault in a file is, for errors that are made far from where the file is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.errors import CorruptFile, UnsafeFile, UnsupportedFile

if TYPE_CHECKING:
    from pathlib import Path


class Mismatch(Exception):
    """What a pickle hands to a function is not what the function takes. Whoever knows the function's name tells it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file and perhaps a record in it; makes the errors that name them."""

    path: Path
    record: str | None = None

    def corrupt(self, problem: str, expected: str | None = None, advice: str | None = None) -> CorruptFile:
        """Return an error for something broken."""
        return CorruptFile(problem, path=self.path, key=self.record, expected=expected, advice=advice)

    def unsafe(self, problem: str, expected: str | None = None, advice: str | None = None) -> UnsafeFile:
        """Return an error for something hostile."""
        return UnsafeFile(problem, path=self.path, key=self.record, expected=expected, advice=advice)

    def unsupported(self, problem: str, expected: str | None = None, advice: str | None = None) -> UnsupportedFile:
        """Return an error for something that is not read."""
        return UnsupportedFile(problem, path=self.path, key=self.record, expected=expected, advice=advice)
