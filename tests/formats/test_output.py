"""A file appears whole or not at all, on every way the system allows."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from sdformats.errors import OutputExists, WriteError
from sdformats.output import SUFFIX, PendingFile, temporary_name
from tests.formats.output_ways import WAYS, listing, posix, pretend, write


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test as on each kind of system."""
    chosen: str = request.param
    pretend(chosen, monkeypatch)
    return chosen


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("named", monkeypatch)


def test_nothing_is_seen_before_commit(tmp_path: Path, way: str) -> None:
    pending = PendingFile(tmp_path / "o", 6, overwrite=False)
    pending.write(3, memoryview(b"def"))
    pending.write(0, memoryview(b"abc"))
    during = listing(tmp_path)
    if way in ("unnamed", "direct"):
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
