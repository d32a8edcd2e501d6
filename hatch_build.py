"""Compile sdkernels' C file into the wheel, where there is a compiler for it. Without one the wheel is as good, but slower."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from sdkernels.build import build


class NativeHook(BuildHookInterface):  # type: ignore[type-arg, unused-ignore]
    """Adds the library to a wheel; for an editable install, leaves it beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Do so before the files are collected."""
        if version == "editable":
            build()
            return
        self._folder = tempfile.TemporaryDirectory()
        library = build(Path(self._folder.name))
        if library is None:
            return
        build_data["force_include"][str(library)] = f"sdkernels/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
