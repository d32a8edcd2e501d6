"""Compile the C files, where there is a compiler for it: when the package is built, or by ``python -m sdkernels.build``.

The library is named for what its source says, so that one made from another version is never loaded, and is no Python
extension: any Python loads it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
_MACHINES = ("x86_64", "amd64")
_FLAGS = (
    *("-std=gnu11", "-O3", "-shared", "-fPIC"),
    *("-mavx2", "-mfma", "-mf16c"),
    "-ffp-contract=off",  # a multiply-add only where the source has one
)


def library(folder: Path | None = None) -> Path:
    """Return where the library is, or would be: in `folder`, or beside the source."""
    digest = hashlib.sha256()
    for source in sorted(FOLDER.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return (folder or FOLDER) / f"native-{digest.hexdigest()[:12]}.so"


def build(folder: Path | None = None) -> Path | None:
    """Compile the library into `folder`, or beside the source, and return where it is.

    None: this is no machine for it, or there is no compiler that can make it. Nothing is lost but speed.
    """
    import subprocess

    target, compiler = library(folder), _compiler()
    if platform.machine().lower() not in _MACHINES or not compiler:
        return None
    made = target.with_suffix(f".{os.getpid()}")
    try:
        sources = map(str, sorted(FOLDER.glob("*.c")))
        subprocess.run([*compiler, *_FLAGS, *sources, "-o", str(made)], check=True, capture_output=True)
        made.replace(target)  # whole or not at all: someone may be loading it
    except (OSError, subprocess.CalledProcessError):
        made.unlink(missing_ok=True)
        return None
    for old in target.parent.glob("native-*.so"):
        if old != target:
            old.unlink()
    return target


def _compiler() -> list[str]:
    """Return the command of a C compiler like gcc or clang: what CC says, Python's own, or a usual one; [] for none."""
    import shlex  # only who compiles needs these
    import sysconfig

    wishes = (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang")
    for wish in wishes:
        command = shlex.split(wish) if isinstance(wish, str) else []
        if command and shutil.which(command[0]):
            return command
    return []


if __name__ == "__main__":
    sys.stdout.write(f"{build() or 'not built: there is no C compiler for it, and all works without it'}\n")
