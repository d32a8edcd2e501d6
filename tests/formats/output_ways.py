"""Each kind of system that an output may be written on, and what the tests of outputs share."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from sdformats import direct
from sdformats.output import PendingFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WAYS = ["unnamed", "direct", "named", "no-links", "no-pwrite", "windows"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions, signals and special files")


def pretend(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a system of that kind does not have."""
    if chosen == "direct":
        monkeypatch.setattr(direct, "LEAST", 0)
        monkeypatch.setattr(direct, "CHUNK", 8192)
    if chosen in ("unnamed", "direct"):
        try:
            os.close(os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR))
        except (AttributeError, OSError):
            pytest.skip("there are no files without names here")
        return
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if chosen == "no-links":
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    if chosen in ("no-pwrite", "windows"):
        monkeypatch.delattr(os, "pwrite", raising=False)
    if chosen == "windows":
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(os, "fchmod", raising=False)


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def write(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    pending = PendingFile(path, len(content), overwrite=overwrite)
    try:
        pending.write(0, memoryview(content))
        pending.commit()
    except BaseException:
        pending.abort()
        raise


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
