"""Under every fault an output may meet, the old file stays and nothing else is left."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from sdformats import output
from sdformats.errors import WriteError
from sdformats.output import PendingFile
from tests.formats.output_ways import WAYS, failing, listing, posix, pretend, write

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test as on each kind of system."""
    chosen: str = request.param
    pretend(chosen, monkeypatch)
    return chosen


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which this process may not write, also where the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if superuser:
            os.seteuid(0)
        folder.chmod(0o755)
        folder.rmdir()


@posix
def test_a_read_only_folder_is_told(read_only: Path, way: str) -> None:
    if os.access(read_only, os.W_OK, effective_ids=True):
        pytest.skip("permissions are not enforced here")
    with pytest.raises(WriteError, match="cannot be written: no permission to write there"):
        PendingFile(read_only / "o", 1, overwrite=False)


def test_too_little_room_is_told_before_anything_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(
        WriteError, match=r"needs 1,000 bytes, and 999 are free in .*; make room or choose another folder"
    ):
        PendingFile(tmp_path / "o", 1000, overwrite=False)
    assert listing(tmp_path) == []
    write(tmp_path / "o", bytes(999))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file would be larger than the system allows"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "Input/output error"),
    ],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "replace"])
@pytest.mark.parametrize("unnamed", [True, False])
@posix
def test_faults_keep_the_old_file(
    tmp_path: Path, call: str, number: int, says: str, unnamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    (tmp_path / "o").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(*(os, call) if call != "replace" else (Path, call), failing(number))
        with pytest.raises(WriteError, match=f"cannot be written: {says}"):
            write(tmp_path / "o", b"new", overwrite=True)
    assert (tmp_path / "o").read_bytes() == b"old"
    assert listing(tmp_path) == ["o"]


def test_a_write_that_comes_back_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    write(tmp_path / "o", b"0123456789")
    assert (tmp_path / "o").read_bytes() == b"0123456789"


@posix
def test_a_fault_met_while_writing_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a failed sync once: a later one that succeeds proves nothing."""
    monkeypatch.setattr(output, "_FLUSH_EVERY", 4)
    met = threading.Event()

    def fail_once(_fd: int) -> None:
        if not met.is_set():
            met.set()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(output, "_sync_data", fail_once)
    pending = PendingFile(tmp_path / "o", 8, overwrite=False)
    pending.write(0, memoryview(b"abcd"))
    assert met.wait(60)
    with pytest.raises(WriteError, match="Input/output error"):
        pending.commit()
    assert listing(tmp_path) == []


def test_pages_are_synced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_FLUSH_EVERY", 4)
    synced = threading.Event()
    monkeypatch.setattr(output, "_sync_data", lambda _: synced.set())
    pending = PendingFile(tmp_path / "o", 8, overwrite=False)
    pending.write(0, memoryview(b"abcd"))
    assert synced.wait(60)
    pending.write(4, memoryview(b"efgh"))
    pending.commit()
    assert (tmp_path / "o").read_bytes() == b"abcdefgh"


@posix
def test_the_file_and_its_folder_are_synced_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, bool]] = []
    real = os.fsync

    def watched(fd: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), (tmp_path / "o").exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", watched)
    write(tmp_path / "o", b"abc")
    assert synced == [(False, False), (True, True)]


def child(program: str, *args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "formats")}
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LIMITED = """
import resource, sys
from pathlib import Path
from sdformats.errors import WriteError
from sdformats.output import PendingFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    PendingFile(Path(sys.argv[1]), 1 << 20, overwrite=True)
except WriteError as error:
    print(error)
"""


@posix
def test_a_limit_on_the_size_of_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"old")
    started = child(LIMITED, str(tmp_path / "o"))
    shown, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (0, "")
    assert shown.strip().endswith("cannot be written: the file would be larger than the system allows")
    assert (tmp_path / "o").read_bytes() == b"old"
    assert listing(tmp_path) == ["o"]


SLOW_SYNC = """
import os, sys, time
from pathlib import Path
from sdformats.output import PendingFile
if sys.argv[2] == "named":
    vars(os).pop("O_TMPFILE", None)
def slow(fd):
    print("syncing", flush=True)
    time.sleep(300)
os.fsync = slow
pending = PendingFile(Path(sys.argv[1]), 3, overwrite=True)
pending.write(0, memoryview(b"new"))
try:
    pending.commit()
except KeyboardInterrupt:
    print("interrupted", sorted(os.listdir(Path(sys.argv[1]).parent)), flush=True)
"""


@posix
@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_a_signal_does_not_wait_for_the_disk(tmp_path: Path, kind: str) -> None:
    (tmp_path / "o").write_bytes(b"old")
    started = child(SLOW_SYNC, str(tmp_path / "o"), kind)
    assert started.stdout is not None
    assert started.stdout.readline() == "syncing\n"
    started.send_signal(signal.SIGINT)
    shown, errors = started.communicate(timeout=60)
    assert (started.returncode, shown, errors) == (0, "interrupted ['o']\n", "")
    assert (tmp_path / "o").read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        )
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    # Whoever gives up an output does not wait for a write that is under way: the disk goes when the last one is done.
    subprocess.run(["umount", "--lazy", folder], check=True)


@posix
def test_a_disk_that_is_full_in_truth(small_disk: Path, way: str) -> None:
    with pytest.raises(WriteError, match="are free in"):
        PendingFile(small_disk / "o", 2 << 20, overwrite=False)
    pending = PendingFile(small_disk / "o", 600_000, overwrite=False)
    (small_disk / "other").write_bytes(bytes(700_000))
    with pytest.raises(WriteError, match="cannot be written: the disk is full"):
        pending.write(0, memoryview(bytes(600_000)))
    pending.abort()
    assert listing(small_disk) == ["other"]
