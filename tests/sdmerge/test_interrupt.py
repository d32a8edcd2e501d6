"""What is left of a merge that does not end well: the old file or the new one, whole, and nothing else.

``SDMERGE_KILLS=50`` kills that many runs instead of a handful.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import sdmerge.run
from sdformats.errors import ChangedFile, OutputExists
from sdmerge import api
from tests.sdmerge import toys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and limits as POSIX has them")
KILLS = int(os.environ.get("SDMERGE_KILLS", "4"))
OLD = b"what was there before" * 1000
NAME = "out.safetensors"
LONG = 120
"""Seconds after which a child is taken for hung. Slow machines are slow: nothing here measures time."""


@dataclass(frozen=True)
class Merge:
    """Three models large enough that a run takes a while, and what their merge is."""

    models: tuple[str, ...]
    digest: str
    writing: float
    """Seconds from the creation of the temporary file to the end of an undisturbed run."""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start(args: Sequence[str], first: str = "") -> subprocess.Popen[str]:
    """Run the command line in a process of its own; `first` is run there before it."""
    command = [sys.executable, "-m", "sdmerge"]
    if first:
        command = [sys.executable, "-c", f"{first}\nimport runpy\nrunpy.run_module('sdmerge', run_name='__main__')"]
    return subprocess.Popen([*command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def add_diff(models: Sequence[str], folder: Path, *more: str, first: str = "") -> subprocess.Popen[str]:
    return start(["add-diff", *models, "-o", str(folder / NAME), "--threads", "2", "--quiet", *more], first)


def until_writing(child: subprocess.Popen[str], folder: Path) -> bool:
    """Wait until the child has a file open in `folder`; False where it ended first."""
    inside = f"{os.path.realpath(folder)}/"
    while child.poll() is None:
        with contextlib.suppress(OSError):
            if sys.platform != "linux":
                if any(name.name.endswith(".sdmerge-tmp") for name in folder.iterdir()):
                    return True
            elif any(str(fd.readlink()).startswith(inside) for fd in Path(f"/proc/{child.pid}/fd").iterdir()):
                return True
        time.sleep(0.002)
    return False


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=LONG)
    return child.returncode, out, err


def assert_one_line(done: tuple[int, str, str], *words: str) -> None:
    status, out, err = done
    assert status == 1, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def assert_silent(done: tuple[int, str, str], status: int) -> None:
    """An end by signal; the empty line keeps a shell's prompt off the line where ^C was typed."""
    assert (done[0], done[1], done[2].strip()) == (status, "", "")


def assert_untouched(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (folder / NAME).read_bytes() == OLD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old output in it."""
    path = tmp_path / "target"
    path.mkdir()
    (path / NAME).write_bytes(OLD)
    return path


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merge]:
    inputs = tmp_path_factory.mktemp("inputs")
    models = []
    for seed, name in enumerate("abc"):
        big = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).half().repeat(32).reshape(8192, 4096)
        models.append(str(toys.save(inputs / name, toys.toy(seed) | {toys.UNET + "input_blocks.1.1.big.weight": big})))
    output = tmp_path_factory.mktemp("clean")
    child = add_diff(models, output)
    assert until_writing(child, output)
    began = time.monotonic()
    assert finish(child) == (0, "", "")
    yield Merge(tuple(models), digest(output / NAME), time.monotonic() - began)
    shutil.rmtree(inputs)
    shutil.rmtree(output)


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    return [toys.saved(tmp_path, name, seed) for seed, name in enumerate("abc")]


def test_kill_9_leaves_the_old_file_or_the_new_one(merge: Merge, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    old = hashlib.sha256(OLD).hexdigest()
    killed = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        overwrite = number % 4 != 3
        if overwrite:
            (folder / NAME).write_bytes(OLD)
        child = add_diff(merge.models, folder, *["--overwrite"] * overwrite)
        until_writing(child, folder)
        time.sleep(moments.uniform(0, merge.writing))
        child.kill()
        killed += finish(child)[0] == -signal.SIGKILL
        left = {path.name: digest(path) for path in folder.iterdir()}
        allowed = [{NAME: merge.digest}, {NAME: old} if overwrite else {}]
        assert left in allowed, f"kill {number} with seed {seed}"
        shutil.rmtree(folder)
    assert killed, "every run was done before its kill"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_at_once_and_leaves_nothing(
    merge: Merge, folder: Path, number: signal.Signals, status: int
) -> None:
    for _ in range(5):
        child = add_diff(merge.models, folder, "--overwrite")
        assert until_writing(child, folder)
        child.send_signal(number)
        done = finish(child)
        if done[0] != 0:  # else it was done before the signal came
            break
        (folder / NAME).write_bytes(OLD)
    assert_silent(done, status)
    assert_untouched(folder)


_SLOW_DISK = """
import os, time
def fsync(fd):
    print("syncing", flush=True)
    time.sleep(600)
os.fsync = fsync
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_does_not_wait_for_the_disk(
    small: list[Path], folder: Path, number: signal.Signals, status: int
) -> None:
    child = add_diff([str(path) for path in small], folder, "--overwrite", first=_SLOW_DISK)
    assert child.stdout is not None
    assert child.stdout.readline() == "syncing\n"
    child.send_signal(number)
    assert_silent(finish(child), status)
    assert_untouched(folder)


def test_a_file_size_limit_is_one_line(merge: Merge, folder: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    child = add_diff(merge.models, folder, "--overwrite", first=limit)
    assert_one_line(finish(child), NAME, "the file would be larger than the system allows")
    assert_untouched(folder)


_FULL_DISK = """
import errno, os
write, left = os.pwrite, [8 << 20]
def pwrite(fd, data, offset):
    left[0] -= len(data)
    if left[0] < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(fd, data, offset)
os.pwrite = pwrite
"""


def test_a_disk_that_fills_up_is_one_line(merge: Merge, folder: Path) -> None:
    child = add_diff(merge.models, folder, "--overwrite", first=_FULL_DISK)
    assert_one_line(finish(child), NAME, "the disk is full")
    assert_untouched(folder)


def test_a_read_only_folder_is_one_line(small: list[Path]) -> None:
    nobody = "import os, torch, sdmerge.api, sdmerge.cli.merge\nos.setgid(65534)\nos.setuid(65534)"
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folder, which is closed to others
        folder = Path(name)
        models = [shutil.copy(path, folder) for path in small]
        folder.chmod(0o755)
        target = folder / "target"
        target.mkdir(mode=0o555)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)
        child = add_diff(models, target, first=nobody if os.getuid() == 0 else "")
        assert_one_line(finish(child), NAME, "no permission to write there")
        assert list(target.iterdir()) == []


def test_a_truncated_input_is_one_line(small: list[Path], folder: Path) -> None:
    os.truncate(small[1], small[1].stat().st_size - 1)
    child = add_diff([str(path) for path in small], folder, "--overwrite")
    assert_one_line(finish(child), str(small[1]), "is cut short", "download or copy it again")
    assert_untouched(folder)


def test_an_input_that_grows_during_the_run_is_one_line(merge: Merge, folder: Path, tmp_path: Path) -> None:
    b = tmp_path / "b.safetensors"
    for _ in range(5):
        shutil.copy(merge.models[1], b)
        child = add_diff([merge.models[0], str(b), merge.models[2]], folder, "--overwrite")
        assert until_writing(child, folder)
        with b.open("ab") as file:
            file.write(b"more")
        done = finish(child)
        if done[0] != 0:  # else it was done before the change came
            break
        (folder / NAME).write_bytes(OLD)
    assert_one_line(done, str(b), "changed while it was being read")
    assert_untouched(folder)


def _replace(path: Path) -> None:
    other = path.with_suffix(".other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        Path.unlink,
        _replace,
    ],
    ids=["touched", "cut", "removed", "replaced"],
)
def test_an_input_that_changes_before_the_end_is_told(
    small: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    work = sdmerge.run.run

    def then_change(*args: object) -> object:
        found = work(*args)  # type: ignore[arg-type]
        change(small[2])
        return found

    monkeypatch.setattr(sdmerge.run, "run", then_change)
    with pytest.raises(ChangedFile) as caught:
        api.add_difference(*small, output=folder / NAME, overwrite=True)
    assert str(small[2]) in str(caught.value)
    assert_untouched(folder)


def link_name(a: Path, kind: str) -> Path:
    """Return another way to say `a`."""
    output = a.with_name("link.safetensors")
    if kind == "symbolic link":
        output.symlink_to(a)
    elif kind == "hard link":
        output.hardlink_to(a)
    elif kind == "detour":
        (a.parent / "d").mkdir()
        output = a.parent / "d" / ".." / a.name
    else:
        output = a
    return output


@pytest.mark.parametrize("kind", ["path", "detour", "symbolic link", "hard link"])
def test_an_output_that_is_an_input(small: list[Path], tmp_path: Path, kind: str) -> None:
    a = small[0]
    before = a.read_bytes()
    output = link_name(a, kind)
    names = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OutputExists, match=f"is the input {a}"):
        api.add_difference(*small, output=output)
    assert a.read_bytes() == before
    expected = tmp_path / "expected"
    expected.mkdir()
    api.add_difference(*small, output=expected / NAME)
    api.add_difference(*small, output=output, overwrite=True)
    new, old = load_file(output), load_file(expected / NAME)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert output.is_symlink() == (kind == "symbolic link")
    assert (a.read_bytes() == before) == (kind == "hard link")
    assert {path.name for path in tmp_path.iterdir()} == names | {"expected"}


def test_two_runs_to_one_target(merge: Merge, folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    api.add_difference(*merge.models, alpha=0.5, output=half / NAME)
    both = [add_diff(merge.models, folder, "--overwrite", "--alpha", alpha) for alpha in ("1", "0.5")]
    assert [finish(child) for child in both] == [(0, "", "")] * 2
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert digest(folder / NAME) in (merge.digest, digest(half / NAME))


def test_modes_survive_a_merge(small: list[Path], folder: Path) -> None:
    (folder / NAME).chmod(0o640)
    api.add_difference(*small, output=folder / NAME, overwrite=True)
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o640
