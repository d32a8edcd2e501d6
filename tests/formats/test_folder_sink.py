"""A diffusers folder appears whole or not at all, and never in the place of another folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from sdformats import folder_sink
from sdformats.errors import OutputExists, WriteError
from sdformats.folder_sink import FolderSink, recover
from sdformats.output import temporary_name
from sdformats.safetensors import SafetensorsSource
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
SPECS = {
    "unet.a.weight": Spec((2,), DType.F32),
    "unet.b": Spec((3,), DType.U8),
    "text_encoder_2.c": Spec((), DType.F16),
}
WEIGHTS = ["text_encoder_2/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
SIDE = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/spiece.model"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="folder locks and signals as POSIX has them")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "template"
    for name in (
        *SIDE,
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/model.ckpt",
        ".git/config.json",
        "unet/.hidden.json",
        "picture.png",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the output will be, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model"


def begin(place: Path, template: Path, fill: int = 1, *, overwrite: bool = False) -> FolderSink:
    sink = FolderSink(place, SPECS, {"k": "v"}, template, overwrite=overwrite)
    for name, spec in SPECS.items():
        sink.write(name, 0, memoryview(bytes([fill]) * spec.nbytes))
    return sink


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def held(place: Path) -> set[int]:
    """The bytes that the tensors of a folder are filled with."""
    found: set[int] = set()
    for name in WEIGHTS:
        with SafetensorsSource(place / name) as source:
            for key in source.specs:
                found |= set(source.read(key))
    return found


@pytest.fixture(params=["exchange", "two-renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two-renames":
        monkeypatch.setattr(folder_sink, "_exchange", lambda _one, _other: False)
    return str(request.param)


def test_a_folder_and_what_makes_it_a_pipeline(place: Path, template: Path) -> None:
    sink = begin(place, template)
    assert not place.exists()
    sink.commit()
    assert listing(place) == sorted(SIDE + WEIGHTS)
    assert (place / "tokenizer" / "merges.txt").read_text() == "this is tokenizer/merges.txt"
    with SafetensorsSource(place / WEIGHTS[1]) as source:
        assert dict(source.specs) == {"a.weight": Spec((2,), DType.F32), "b": Spec((3,), DType.U8)}
        assert source.metadata == {"k": "v"}
        assert source.read("b") == bytes([1, 1, 1])
    sink.abort()
    assert place.is_dir()
    assert os.listdir(place.parent) == ["model"]  # noqa: PTH208


def test_abort_leaves_nothing(place: Path, template: Path) -> None:
    sink = begin(place, template)
    sink.abort()
    sink.abort()
    assert list(place.parent.iterdir()) == []


def test_a_folder_is_replaced_only_when_asked(place: Path, template: Path, way: str) -> None:
    begin(place, template, 1).commit()
    (place / "unet" / "old.bin").write_bytes(b"old")
    with pytest.raises(OutputExists, match="exists already; pass --overwrite"):
        begin(place, template)
    sink = begin(place, template, 2, overwrite=True)
    assert held(place) == {1}
    sink.commit()
    assert held(place) == {2}
    assert listing(place) == sorted(SIDE + WEIGHTS)
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_a_folder_can_replace_its_own_template(place: Path, template: Path, way: str) -> None:
    begin(template, template, 7, overwrite=True).commit()
    assert held(template) == {7}
    assert listing(template) == sorted(SIDE + WEIGHTS)
    assert [path.name for path in template.parent.iterdir()] == ["template"]


def test_no_other_folder_is_ever_replaced(place: Path, template: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="is no diffusers folder and is not replaced; choose another name"):
        begin(place, template, overwrite=True)
    (place / "thesis.txt").rename(place.with_name("file"))
    with pytest.raises(OutputExists, match="is no diffusers folder"):
        begin(place.with_name("file"), template, overwrite=True)
    begin(place, template, overwrite=True).commit()  # an empty one holds nothing to lose
    assert held(place) == {1}


def test_a_folder_that_appears_in_the_meantime_is_kept(place: Path, template: Path) -> None:
    sink = begin(place, template)
    place.mkdir()
    (place / "other.txt").write_text("someone else's")
    with pytest.raises(OutputExists):
        sink.commit()
    assert listing(place.parent) == ["model/other.txt"]
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_a_symbolic_link_is_written_through(place: Path, template: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    place.symlink_to(tmp_path / "far" / "real")
    begin(place, template, 1).commit()
    begin(place, template, 2, overwrite=True).commit()
    assert place.is_symlink()
    assert held(tmp_path / "far" / "real") == {2}


@pytest.mark.parametrize(
    "name", ["../x.w", "/tmp.w", "a/b.w", "..w", ".hidden.w", "w", "", "a\\b.w", "a b.w", "-x.w", "é.w", "a\n.w"]
)
def test_components_are_plain_names(place: Path, template: Path, name: str) -> None:
    with pytest.raises(WriteError, match="names no component of a diffusers folder"):
        FolderSink(place, {name: Spec((1,), DType.U8)}, {}, template)
    assert list(place.parent.iterdir()) == []


def test_keys_may_look_like_paths(place: Path, template: Path) -> None:
    with FolderSink(place, {"unet.../../x": Spec((1,), DType.U8)}, {}, template) as sink:
        sink.write("unet.../../x", 0, memoryview(b"x"))
    assert listing(place.parent) == sorted(f"model/{name}" for name in [*SIDE, WEIGHTS[1]])


def test_what_cannot_be_is_told_before_anything_is_created(
    place: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WriteError, match="does not exist; create it first"):
        begin(place / "deeper" / "model", template)
    with pytest.raises(WriteError, match="fills no whole number of bytes"):
        FolderSink(place, {"unet.w": Spec((1,), DType.F4)}, {}, template)
    monkeypatch.setattr("sdformats.output.shutil.disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(WriteError, match="needs 13 bytes, and 9 are free"):
        begin(place, template)
    assert list(place.parent.iterdir()) == []


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["os.fsync", "shutil.copyfile", "pathlib.Path.rename"])
def test_faults_keep_the_old_folder(place: Path, template: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(place, template, 1).commit()
    monkeypatch.setattr(folder_sink, "_exchange", lambda _one, _other: False)
    sink = begin(place, template, 2, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(call, failing(errno.ENOSPC))
        with pytest.raises(WriteError, match="cannot be written"):
            sink.commit()
    assert held(place) == {1}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_a_second_rename_that_fails_puts_the_old_folder_back(
    place: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(place, template, 1).commit()
    monkeypatch.setattr(folder_sink, "_exchange", lambda _one, _other: False)
    sink = begin(place, template, 2, overwrite=True)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target == place and "-old" not in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(WriteError, match="Input/output error"):
            sink.commit()
    assert held(place) == {1}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@posix
def test_what_dead_runs_left_is_removed_and_what_living_ones_write_is_kept(place: Path, template: Path) -> None:
    living = begin(place, template, 1)
    (kept,) = [path.name for path in place.parent.iterdir()]
    stale, foreign = temporary_name(place), temporary_name(place.with_name("other"))
    for folder in (stale, foreign, place.with_name(".model.notes")):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "x").write_bytes(b"x")
    link = temporary_name(place)
    link.symlink_to(foreign)
    recover(place)
    assert {path.name for path in place.parent.iterdir()} == {kept, foreign.name, ".model.notes", link.name}
    assert (foreign / "unet" / "x").exists()
    living.commit()
    assert held(place) == {1}


@posix
def test_a_folder_that_stepped_aside_comes_back(place: Path, template: Path) -> None:
    begin(place, template, 1).commit()
    aside = place.with_name(".model.01234567-old.sdmerge-tmp")
    place.rename(aside)
    recover(place)
    assert held(place) == {1}
    assert not aside.exists()
    shutil.copytree(place, aside)  # the new folder was in place already: the old one goes
    recover(place)
    assert [path.name for path in place.parent.iterdir()] == ["model"]


KILLED = """
import os, sys
from pathlib import Path
from sdformats import folder_sink
from sdformats.tensor import DType, Spec
place, template, when, renames = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "two-renames"
count = 0
def die_at(name, owner):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == when:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)
if renames:
    folder_sink._exchange = lambda one, other: False
for name, owner in (("fsync", os), ("rename", os), ("rename", Path), ("mkdir", Path), ("_exchange", folder_sink)):
    die_at(name, owner)
for name, owner in (("copyfile", folder_sink.shutil), ("rmtree", folder_sink.shutil), ("_put_back", folder_sink)):
    die_at(name, owner)
with folder_sink.FolderSink(place, {"unet.w": Spec((3,), DType.U8)}, {}, template, overwrite=True) as sink:
    sink.write("unet.w", 0, memoryview(bytes([2, 2, 2])))
print("done", flush=True)
"""


@posix
@pytest.mark.parametrize("renames", ["exchange", "two-renames"])
def test_kill_9_at_every_step_leaves_the_old_folder_or_the_new_one(tmp_path: Path, renames: str) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "model_index.json").write_text("{}")
    place = tmp_path / "out" / "model"
    specs = {"unet.w": Spec((3,), DType.U8)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "formats")}
    seen = set()
    for when in range(1, 60):
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        with FolderSink(place, specs, {}, template) as sink:
            sink.write("unet.w", 0, memoryview(bytes([1, 1, 1])))
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(place), str(template), str(when), renames],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if renames == "exchange":
            assert place.is_dir()
        recover(place)
        assert [path.name for path in place.parent.iterdir()] == ["model"]
        with SafetensorsSource(place / WEIGHTS[1]) as source:
            seen.add(bytes(source.read("w")))
        assert listing(place) == ["model_index.json", WEIGHTS[1]]
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert seen == {bytes([1, 1, 1]), bytes([2, 2, 2])}
