"""A file appears whole or not at all: on every way the system allows, under every fault it may meet."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sdformats import output
from sdformats.errors import OutputExists, WriteError
from sdformats.output import SUFFIX, PendingFile, temporary_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
WAYS = ["unnamed", "named", "no-links", "no-pwrite", "windows"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions, signals and special files")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test as on each kind of system."""
    chosen: str = request.param
    if chosen == "unnamed":
        if not hasattr(os, "O_TMPFILE"):
            pytest.skip("files without names are for Linux")
        return chosen
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if chosen == "no-links":
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    if chosen in ("no-pwrite", "windows"):
        monkeypatch.delattr(os, "pwrite", raising=False)
    if chosen == "windows":
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(os, "fchmod", raising=False)
    return chosen


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)


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


def test_nothing_is_seen_before_commit(tmp_path: Path, way: str) -> None:
    pending = PendingFile(tmp_path / "o", 6, overwrite=False)
    pending.write(3, memoryview(b"def"))
    pending.write(0, memoryview(b"abc"))
    during = listing(tmp_path)
    if way == "unnamed":
        assert during == []
    else:
        (temporary,) = during
        assert temporary.startswith(".o.")
        assert temporary.endswith(SUFFIX)
    pending.commit()
    assert listing(tmp_path) == ["o"]
    assert (tmp_path / "o").read_bytes() == b"abcdef"
    pending.abort()
    assert (tmp_path / "o").read_bytes() == b"abcdef"


def test_abort_leaves_nothing(tmp_path: Path, way: str) -> None:
    pending = PendingFile(tmp_path / "o", 3, overwrite=False)
    pending.write(0, memoryview(b"abc"))
    pending.abort()
    pending.abort()
    assert listing(tmp_path) == []


def test_an_existing_file_is_kept_or_replaced_as_asked(tmp_path: Path, way: str) -> None:
    write(tmp_path / "o", b"old")
    with pytest.raises(OutputExists, match="exists already; pass --overwrite"):
        PendingFile(tmp_path / "o", 3, overwrite=False)
    pending = PendingFile(tmp_path / "o", 4, overwrite=True)
    pending.write(0, memoryview(b"newe"))
    assert (tmp_path / "o").read_bytes() == b"old"
    pending.commit()
    assert (tmp_path / "o").read_bytes() == b"newe"
    assert listing(tmp_path) == ["o"]


def test_an_aborted_overwrite_keeps_the_old_file(tmp_path: Path, way: str) -> None:
    write(tmp_path / "o", b"old")
    pending = PendingFile(tmp_path / "o", 3, overwrite=True)
    pending.write(0, memoryview(b"new"))
    pending.abort()
    assert (tmp_path / "o").read_bytes() == b"old"
    assert listing(tmp_path) == ["o"]


def test_a_file_that_appears_in_the_meantime_is_kept(tmp_path: Path, way: str) -> None:
    if way == "windows" and os.name != "nt":
        pytest.skip("only on Windows a rename refuses to replace")
    pending = PendingFile(tmp_path / "o", 3, overwrite=False)
    pending.write(0, memoryview(b"new"))
    (tmp_path / "o").write_bytes(b"other")
    with pytest.raises(OutputExists, match="exists already"):
        pending.commit()
    assert (tmp_path / "o").read_bytes() == b"other"
    assert listing(tmp_path) == ["o"]


def test_a_target_that_disappears_in_the_meantime_is_written(tmp_path: Path, way: str) -> None:
    (tmp_path / "o").write_bytes(b"old")
    pending = PendingFile(tmp_path / "o", 3, overwrite=True)
    pending.write(0, memoryview(b"new"))
    (tmp_path / "o").unlink()
    pending.commit()
    assert (tmp_path / "o").read_bytes() == b"new"


@posix
def test_a_symbolic_link_is_written_through(tmp_path: Path, way: str) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "o").symlink_to(Path("..", "far", "real"))
    write(tmp_path / "near" / "o", b"first")
    write(tmp_path / "near" / "o", b"second", overwrite=True)
    assert (tmp_path / "near" / "o").is_symlink()
    assert (tmp_path / "far" / "real").read_bytes() == b"second"
    assert listing(tmp_path / "near") == ["o"]
    assert listing(tmp_path / "far") == ["real"]


def test_a_hard_link_keeps_the_old_bytes(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"old")
    os.link(tmp_path / "o", tmp_path / "other")
    write(tmp_path / "o", b"new", overwrite=True)
    assert (tmp_path / "other").read_bytes() == b"old"
    assert (tmp_path / "o").read_bytes() == b"new"


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_new_file_has_the_usual_permissions(
    tmp_path: Path, umask: int, mode: int, unnamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    before = os.umask(umask)
    try:
        write(tmp_path / "o", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "o").stat().st_mode) == mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o755, 0o440])
def test_overwriting_keeps_the_permissions(tmp_path: Path, mode: int) -> None:
    (tmp_path / "o").write_bytes(b"old")
    (tmp_path / "o").chmod(mode)
    write(tmp_path / "o", b"new", overwrite=True)
    assert stat.S_IMODE((tmp_path / "o").stat().st_mode) == mode


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"the folder .*nowhere does not exist; create it first"):
        PendingFile(tmp_path / "nowhere" / "o", 1, overwrite=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=r"the folder .*file does not exist"):
        PendingFile(tmp_path / "file" / "o", 1, overwrite=True)
    assert listing(tmp_path) == ["file"]


@posix
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        place = Path(tempfile.mkdtemp()) / "s"  # the names of sockets are short
        listener.bind(str(place))
        (tmp_path / "socket").symlink_to(place)
        (tmp_path / "loop").symlink_to("loop")
        for name in ("folder", "pipe", "socket"):
            with pytest.raises(WriteError, match="is not a regular file"):
                PendingFile(tmp_path / name, 1, overwrite=True)
        with pytest.raises(WriteError, match="cannot be written"):
            PendingFile(tmp_path / "loop", 1, overwrite=True)
        place.unlink()
        place.parent.rmdir()
    with pytest.raises(WriteError, match="is not a regular file"):
        PendingFile(Path(os.devnull), 1, overwrite=True)
    assert listing(tmp_path) == ["folder", "loop", "pipe", "socket"]


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


@posix
@pytest.mark.usefixtures("named")
def test_temporaries_of_dead_writers_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    living = PendingFile(tmp_path / "o", 1, overwrite=False)
    (kept,) = listing(tmp_path)
    stale = temporary_name(tmp_path / "o")
    foreign = [temporary_name(tmp_path / "p"), tmp_path / ".o.txt", tmp_path / f"o{SUFFIX}"]
    for path in (stale, *foreign):
        path.write_bytes(b"x")
    aimed = temporary_name(tmp_path / "o")
    aimed.symlink_to(tmp_path / ".o.txt")
    write(tmp_path / "o", b"done")
    assert listing(tmp_path) == sorted(["o", kept, aimed.name, *(path.name for path in foreign)])
    assert (tmp_path / ".o.txt").read_bytes() == b"x"
    living.abort()
    assert kept not in listing(tmp_path)


@pytest.mark.usefixtures("named")
def test_long_names_leave_room_for_the_temporary(tmp_path: Path) -> None:
    name = "é" * 127
    write(tmp_path / name, b"x")
    write(tmp_path / name, b"y", overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"y")]


@posix
def test_of_two_runs_to_one_target_one_complete_output_wins(tmp_path: Path, way: str) -> None:
    if way == "windows":
        pytest.skip("only on Windows an open file keeps its name")
    size, runs, stop = 1 << 16, 6, threading.Event()
    seen: set[bytes] = set()
    (tmp_path / "o").write_bytes(bytes([255]) * size)

    def look() -> None:
        while not stop.is_set():
            seen.add((tmp_path / "o").read_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        writers = [
            threading.Thread(target=write, args=(tmp_path / "o", bytes([i]) * size), kwargs={"overwrite": True})
            for i in range(runs)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    finally:
        stop.set()
        watcher.join()
    whole = {bytes([i]) * size for i in (*range(runs), 255)}
    assert (tmp_path / "o").read_bytes() in whole - {bytes([255]) * size}
    assert seen <= whole
    assert listing(tmp_path) == ["o"]


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
    subprocess.run(["umount", folder], check=True)


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
