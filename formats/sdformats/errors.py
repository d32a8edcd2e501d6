"""Everything that can be wrong with a file, as one small tree.

::

    FormatError                what, where (file and key), expected, next step
    ├── UnknownFormat          the bytes are no model file we know (a web page, a git-lfs pointer, GGUF, …)
    ├── UnsupportedFile        recognised, but not something we read (TorchScript, sparse tensors, …)
    ├── CorruptFile            recognised, but broken (cut off, overlapping, wrong checksum, …)
    ├── UnsafeFile             would run code, or would cost far more memory than the file is worth
    ├── ChangedFile            the file changed while it was being read
    └── WriteError             the output could not be written
        └── OutputExists       there is something at the output's place already
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST = 400


class FormatError(Exception):
    """Root of all errors about files.

    Args:
        problem: what is wrong, in plain words, without a final full stop.
        path: the file in which it is wrong.
        key: the tensor, record or field in which it is wrong.
        expected: what was expected instead.
        advice: what to do next.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: Path | str | None = None,
        key: str | None = None,
        expected: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = path
        self.key = key
        self.expected = expected
        self.advice = advice
        super().__init__(problem)

    def __str__(self) -> str:
        where = [str(self.path)] if self.path is not None else []
        if self.key is not None:
            where.append(_short(repr(self.key)))
        text = ": ".join([*where, _short(self.problem)])
        if self.expected:
            text += f" (expected {self.expected})"
        if self.advice:
            text += f"; {self.advice}"
        return text


def _short(text: str) -> str:
    """Cut what a file may have made very long."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 60]}…{text[-50:]}"


class UnknownFormat(FormatError):
    """The bytes are no model file we know."""


class UnsupportedFile(FormatError):
    """The file is recognised, but is not something we read."""


class CorruptFile(FormatError):
    """The file is recognised, but broken."""


class UnsafeFile(FormatError):
    """Reading the file as others do would run code, or cost far more memory than it is worth."""


class ChangedFile(FormatError):
    """The file changed while it was being read."""


class WriteError(FormatError):
    """The output could not be written."""


class OutputExists(WriteError):
    """There is something at the output's place already."""

    @classmethod
    def at(cls, path: Path) -> OutputExists:
        """Return the error for something that may be replaced if the user says so."""
        return cls("exists already", path=path, advice="pass --overwrite, or choose another name")
