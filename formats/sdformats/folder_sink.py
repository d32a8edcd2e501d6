"""A diffusers folder that appears whole or not at all.

Everything is written into a temporary folder beside the target, which takes the target's name in one step: a rename, or,
over an existing folder, an exchange of the two (Linux; elsewhere the old folder steps aside for the moment of two renames).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.errors import OutputExists, WriteError
from sdformats.output import SUFFIX, sync_folder
from sdformats.safetensors import SafetensorsSink
from sdformats.tensor import Spec, TensorSink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INDEX = "model_index.json"
_SIDE_FILES = {".json", ".txt", ".model", ".yaml"}
_MAX_SIDE_FILE = 64 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class FolderSink(TensorSink):
    """A diffusers folder being written: one safetensors file for each component, the rest copied from another folder.

    Args:
        path: where the folder will be.
        specs: every tensor, named ``component.key``.
        metadata: texts for the header of each file.
        template: the folder from which configs, tokenizers and the like are taken.
        overwrite: whether an existing diffusers folder may be replaced. No other folder ever is.

    Raises:
        OutputExists, WriteError: before anything is created.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        template: Path,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.target = Path(os.path.realpath(path))
        self._check_target(overwrite)
        self._template = template
        self._work: Path | None = self.target.with_name(f".{self.target.name[:200]}.{secrets.token_hex(4)}{SUFFIX}")
        self._sinks: dict[str, SafetensorsSink] = {}
        try:
            self._work.mkdir()
            for component, inside in _by_component(specs).items():
                folder = self._work / component
                folder.mkdir()
                self._sinks[component] = SafetensorsSink(folder / _weights_name(component), inside, metadata)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot be written: {error.strerror or error}", path=path) from error
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSink.write`."""
        component, _, key = name.partition(".")
        self._sinks[component].write(key, offset, buffer)

    def commit(self) -> None:
        """See `TensorSink.commit`."""
        assert self._work is not None, "commit after commit or abort"
        try:
            for sink in self._sinks.values():
                sink.commit()
            for source in _side_files(self._template):
                place = self._work / source.relative_to(self._template)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)
                _sync_file(place)
            for folder in sorted({p.parent for p in self._work.rglob("*")}, reverse=True):
                sync_folder(folder)
            self._publish(self._work)
            sync_folder(self.target.parent)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot be written: {error.strerror or error}", path=self.path) from error
        except BaseException:
            self.abort()
            raise
        self._work = None

    def abort(self) -> None:
        """See `TensorSink.abort`."""
        for sink in self._sinks.values():
            sink.abort()
        work, self._work = self._work, None
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)

    def _check_target(self, overwrite: bool) -> None:
        if not self.target.parent.is_dir():
            raise WriteError(
                f"the folder {self.target.parent} does not exist", path=self.path, advice="create it first"
            )
        if not self.target.exists():
            return
        if not overwrite:
            raise OutputExists("exists already", path=self.path, advice="pass --overwrite, or choose another name")
        if not self.target.is_dir() or not ((self.target / INDEX).is_file() or not any(self.target.iterdir())):
            raise OutputExists(
                "is no diffusers folder and is not replaced", path=self.path, advice="choose another name"
            )

    def _publish(self, work: Path) -> None:
        if not self.target.exists():
            work.rename(self.target)
            return
        if not _exchange(work, self.target):
            aside = work.with_name(work.name.replace(SUFFIX, f"-old{SUFFIX}"))
            self.target.rename(aside)
            work.rename(self.target)
            work = aside
        shutil.rmtree(work, ignore_errors=True)


def _by_component(specs: Mapping[str, Spec]) -> dict[str, dict[str, Spec]]:
    found: dict[str, dict[str, Spec]] = {}
    for name, spec in specs.items():
        component, dot, key = name.partition(".")
        if not dot or component in ("", ".", "..") or "/" in component or "\\" in component:
            raise WriteError("names no component of a diffusers folder", key=name, expected="component.key")
        found.setdefault(component, {})[key] = spec
    return found


def _weights_name(component: str) -> str:
    transformers = component.startswith(("text_encoder", "image_encoder", "safety_checker"))
    return "model.safetensors" if transformers else "diffusion_pytorch_model.safetensors"


def _side_files(template: Path) -> Iterator[Path]:
    """Yield the small files that make a folder of weights a pipeline: configs, vocabularies, schedules."""
    for path in sorted(template.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(template).parts)
        if hidden or path.suffix not in _SIDE_FILES or path.name.endswith(".index.json") or not path.is_file():
            continue
        if path.stat().st_size <= _MAX_SIDE_FILE:
            yield path


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
