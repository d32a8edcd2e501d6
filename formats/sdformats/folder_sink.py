"""A diffusers folder that appears whole or not at all.

Everything is written into a temporary folder beside the target, which takes the target's name in one step: a rename, or,
over an existing folder, an exchange of the two (Linux; elsewhere the old folder steps aside for the moment of two renames).
The temporary folder is locked while its writer lives. Whatever ends the process, the next run to the same target puts back
a folder that stepped aside, and removes what nobody is writing any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.errors import OutputExists, WriteError
from sdformats.keymap import EXTRAS, EXTRAS_FILE
from sdformats.output import SUFFIX, check_room, stem, sync_folder, temporary_name
from sdformats.safetensors import SafetensorsSink
from sdformats.tensor import TensorSink

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.tensor import Spec

    Place = Callable[[str], tuple[str, str]]
    """Returns a tensor's file inside a folder, and its name there."""

INDEX = "model_index.json"
_SIDE_FILES = {".json", ".txt", ".model", ".yaml"}
_MAX_SIDE_FILE = 64 << 20
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_ASIDE = f"-old{SUFFIX}"
_ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a change after which a temporary folder counts as abandoned, where folders cannot be locked."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class FolderSink(TensorSink):
    """A folder being written: safetensors files, and files of text beside them, given or copied from another folder.

    Args:
        path: where the folder will be.
        specs: every tensor; of a diffusers folder, named ``component.key``.
        metadata: texts for the header of each file.
        template: the folder from which configs, tokenizers and the like are taken; None: from none.
        place: returns a tensor's file inside the folder, and its name there.
        copies: other files to copy, by their name inside the folder.
        texts: other files: what is in them, by their name inside the folder. They take the place of copied ones.
        overwrite: whether an existing folder of the same kind may be replaced. No other folder ever is.

    Raises:
        OutputExists, WriteError: before anything is created.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        template: Path | None,
        *,
        place: Place | None = None,
        copies: Mapping[str, Path] | None = None,
        texts: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.target = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._copies = {**(side_files(template) if template is not None else {}), **(copies or {})}
        self._texts = dict(texts or {})
        self._place = place or component_place
        self._sinks: dict[str, SafetensorsSink] = {}
        self._work: Path | None = None
        self._lock: int | None = None
        files: dict[str, dict[str, Spec]] = {}
        for name, spec in specs.items():
            file, key = self._place(name)
            files.setdefault(file, {})[key] = spec
        recover(self.target)
        self._check_target()
        check_room(path, self.target.parent, sum(spec.nbytes for spec in specs.values()))
        try:
            self._work = temporary_name(self.target)
            self._work.mkdir()
            self._lock = _lock(self._work)
            for file, inside in files.items():
                target = self._work / file
                target.parent.mkdir(parents=True, exist_ok=True)
                self._sinks[file] = SafetensorsSink(target, inside, metadata)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot be written: {error.strerror or error}", path=path) from error
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        file, key = self._place(name)
        self._sinks[file].write(key, offset, buffer)

    def commit(self) -> None:
        assert self._work is not None, "commit after commit or abort"
        try:
            for sink in self._sinks.values():
                sink.commit()
            self._write_side_files(self._work)
            for folder in sorted({p.parent for p in self._work.rglob("*")}, reverse=True):
                sync_folder(folder)
            self._check_target()
            self._publish(self._work)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot be written: {error.strerror or error}", path=self.path) from error
        except BaseException:
            self.abort()
            raise
        self._work = None
        self._unlock()

    def _write_side_files(self, work: Path) -> None:
        for name, source in self._copies.items():
            place = work / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            _sync_file(place)
        for name, text in self._texts.items():
            place = work / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
            _sync_file(place)

    def abort(self) -> None:
        for sink in self._sinks.values():
            sink.abort()
        work, self._work = self._work, None
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _check_target(self) -> None:
        if not self.target.parent.is_dir():
            raise WriteError(
                f"the folder {self.target.parent} does not exist", path=self.path, advice="create it first"
            )
        if not self.target.exists():
            return
        if not self._overwrite:
            raise OutputExists.at(self.path)
        pipeline = INDEX in self._texts or not self._texts
        marks = [INDEX] if pipeline else list(self._texts)
        alike = self.target.is_dir() and all((self.target / mark).is_file() for mark in marks)
        if not alike and not (self.target.is_dir() and not any(self.target.iterdir())):
            what = "no diffusers folder" if pipeline else "no folder of this kind"
            raise OutputExists(f"is {what} and is not replaced", path=self.path, advice="choose another name")

    def _publish(self, work: Path) -> None:
        replaced = self.target.exists()
        if not replaced:
            work.rename(self.target)
        elif not _exchange(work, self.target):
            aside = work.with_name(work.name.removesuffix(SUFFIX) + _ASIDE)
            try:
                self.target.rename(aside)
                work.rename(self.target)
            except BaseException:
                _put_back(aside, self.target)
                raise
            work = aside
        sync_folder(self.target.parent)
        if replaced:
            shutil.rmtree(work, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo what runs to the same target left that were ended half-way."""
    names = re.compile(re.escape(f".{stem(target)}.") + "[0-9a-f]{8}(-old)?" + re.escape(SUFFIX))
    for entry in sorted(target.parent.iterdir()) if os.access(target.parent, os.R_OK) else ():
        if not names.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            continue
        if entry.name.endswith(_ASIDE):
            _put_back(entry, target)
        if entry.exists() and _abandoned(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _put_back(aside: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        if not target.exists():
            aside.rename(target)


def _abandoned(folder: Path) -> bool:
    """Whether nobody writes to a temporary folder any more."""
    try:
        if sys.platform == "win32":
            return time.time() - folder.stat().st_mtime > _ABANDONED_AFTER
        lock = _lock(folder)
        if lock is None:
            return False
        os.close(lock)
    except OSError:
        return False
    return True


def _lock(folder: Path) -> int | None:
    """Lock a folder: return a descriptor that holds the lock, or None where it is locked already or there are no locks."""
    if sys.platform == "win32":
        return None
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def component_place(name: str) -> tuple[str, str]:
    """Return the file inside a diffusers folder that a tensor belongs into, and its name there.

    Args:
        name: the tensor's, ``component.key``.

    Raises:
        WriteError: it names no component.
    """
    component, dot, key = name.partition(".")
    if not dot or not _COMPONENT.fullmatch(component):
        raise WriteError("names no component of a diffusers folder", key=name, expected="component.key")
    if component == EXTRAS:
        return EXTRAS_FILE, key
    return f"{component}/{_weights_name(component)}", key


def _weights_name(component: str) -> str:
    transformers = component.startswith(("text_encoder", "image_encoder", "safety_checker"))
    return "model.safetensors" if transformers else "diffusion_pytorch_model.safetensors"


def side_files(folder: Path) -> dict[str, Path]:
    """Return the small files that make a folder of weights a pipeline (configs, vocabularies, schedules), by their names."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or path.suffix not in _SIDE_FILES or path.name.endswith(".index.json") or not path.is_file():
            continue
        if path.stat().st_size <= _MAX_SIDE_FILE:
            found[name.as_posix()] = path
    return found


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0:
            return True
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise WriteError(f"cannot be written: {os.strerror(ctypes.get_errno())}", path=other)
    return False
