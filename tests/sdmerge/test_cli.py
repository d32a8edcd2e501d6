"""The command line: help, exit statuses, one-line errors, JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from sdmerge import __version__, cli
from sdmerge.cli import screen
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(toys.saved(tmp_path, name, seed)) for seed, name in enumerate("abc")]


def sdmerge(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sdmerge", *args], capture_output=True, text=True, check=False)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.root, args)


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_does_not_load_torch(args: list[str]) -> None:
    program = (
        "import sys\nfrom sdmerge.cli import root\n"
        f"root.main({args!r}, standalone_mode=False)\n"
        "print('LOADED', sorted({'torch', 'numpy', 'diffusers', 'triton'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout


def test_every_command_is_listed_with_its_own_words() -> None:
    listed = invoke("--help").output
    for name, (_, text) in cli.COMMANDS.items():
        assert name in listed
        own = invoke(name, "--help").output
        assert re.sub(r"\s+", " ", text) in re.sub(r"\s+", " ", own), name


def test_version() -> None:
    assert __version__ in invoke("--version").output


def test_a_merge_reports_on_stderr_and_exits_0(tmp_path: Path, models: list[str]) -> None:
    done = sdmerge("add-diff", *models, "-o", str(tmp_path / "o.safetensors"))
    assert done.returncode == 0
    assert done.stdout == ""
    assert "tensors" in done.stderr
    assert "\x1b" not in done.stderr
    quiet = sdmerge("weighted", *models[:2], "-o", str(tmp_path / "o.safetensors"), "--overwrite", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_json_reports_go_to_stdout(tmp_path: Path, models: list[str]) -> None:
    out = str(tmp_path / "o.safetensors")
    report = json.loads(sdmerge("weighted", *models, "--weights", "0.5,0.3,0.2", "-o", out, "--json").stdout)
    assert report["output"] == out
    assert report["written"] is True
    assert report["family"] == "sd1"
    dry = json.loads(sdmerge("convert", models[0], str(tmp_path / "p.safetensors"), "--json", "--dry-run").stdout)
    assert dry["written"] is False


def test_expected_errors_are_one_line_and_exit_1(tmp_path: Path, models: list[str]) -> None:
    out = str(tmp_path / "o.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for args in (
        ["add-diff", *models[:2], str(tmp_path / "none.safetensors"), "-o", out],
        ["add-diff", *models[:2], str(tmp_path / "text.safetensors"), "-o", out],
        ["add-diff", *models, "-o", models[0]],
        ["add-diff", *models, "-o", str(tmp_path / "nowhere" / "o.safetensors")],
        ["add-diff", *models, "-o", str(tmp_path / "o.ckpt")],
        ["add-diff", *models, "-o", out, "--device", "cuda:77"],
    ):
        done = sdmerge(*args)
        assert done.returncode == 1, args
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "text.safetensors",
    ]


def test_wrong_usage_exits_2(models: list[str]) -> None:
    for args in (
        ["add-diff", *models],
        ["add-diff", models[0], "-o", "x.safetensors"],
        ["weighted", *models, "-o", "x.safetensors"],
        ["weighted", *models, "--weights", "1,2", "-o", "x.safetensors"],
        ["weighted", *models, "--weights", "a,b,c", "-o", "x.safetensors"],
        ["add-diff", *models, "-o", "x.safetensors", "--dtype", "int8"],
        ["frobnicate"],
    ):
        assert sdmerge(*args).returncode == 2, args
    assert "did you mean 'weighted'?" in sdmerge("wieghted").stderr


def test_bugs_are_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli.root, "main", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "bug" in shown


def test_what_files_say_cannot_steer_the_terminal() -> None:
    assert screen.clean("a\x1b[31mb\u202ec\n\x9bd") == r"a\x1b[31mb\u202ec\n\x9bd"
    assert screen.clean("naïve 漢字 α") == "naïve 漢字 α"
    assert [screen.human(n) for n in (0, 999, 2_130_000_000, 1e15)] == ["0 B", "999 B", "2.13 GB", "1,000 TB"]
