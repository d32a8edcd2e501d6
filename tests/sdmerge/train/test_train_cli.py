"""``sdmerge train``: options made from the settings, settings from a file, and bad data told in one list."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from PIL import Image

from sdmerge import cli
from sdmerge.errors import RequestError
from sdmerge.train import run
from sdmerge.train.method import METHODS, find
from sdmerge.train.settings import DataSettings, OptimizerSettings, fields_for, made

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def train(*args: str) -> Result:
    return CliRunner().invoke(cli.root, ["train", *args])


@pytest.mark.parametrize("name", [*METHODS])
def test_help_names_every_setting_and_does_not_load_torch(name: str) -> None:
    program = (
        "import sys\nfrom sdmerge.cli import root\n"
        f"root.main(['train', {name!r}, '--help'], standalone_mode=False)\n"
        "print('LOADED', sorted({'torch', 'numpy', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    for _, field in fields_for(find(name)):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


def test_settings_are_checked() -> None:
    assert made(OptimizerSettings, {}, {"lr": 0.5}).lr == 0.5
    assert made(DataSettings, {"data": "x", "flip": True}).flip
    for values, said in (
        ({}, "data is missing"),
        ({"data": "x", "caption_dropout": 2}, "from 0 to 1"),
        ({"data": "x", "flip": "yes"}, "true or false"),
        ({"data": 3}, "a text"),
    ):
        with pytest.raises(RequestError, match=said):
            made(DataSettings, values)
    with pytest.raises(RequestError, match="did you mean 'rank'"):
        run("lora", model="m", data="d", output="o", rnk=3)
    with pytest.raises(RequestError, match="did you mean 'lora'"):
        run("lroa")


def test_a_file_gives_settings_and_options_win(tmp_path: Path, toy: Path, diamonds: Path) -> None:
    settings: dict[str, Any] = {"model": str(toy), "data": str(diamonds), "steps": 5, "rank": 2, "targets": "attention"}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings | {"save-every": 0, "device": "cpu"}), encoding="utf-8")
    output = tmp_path / "o.safetensors"
    done = train("lora", "--config", str(config), "--steps", "1", "-o", str(output), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] is True
    lines = (tmp_path / "o.safetensors.run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    config.write_text("- 1")
    assert isinstance(train("lora", "--config", str(config), "-o", "x").exception, RequestError)


def test_bad_data_is_told_in_one_list_and_nothing_is_written(tmp_path: Path, toy: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "broken.png").write_bytes(b"\x89PNG")
    (data / "broken.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(data / "a.png")
    (data / "a.txt").write_bytes(b"\xff")
    args = ["train", "lora", "--model", str(toy), "--data", str(data), "-o", str(tmp_path / "o.safetensors")]
    done = subprocess.run([sys.executable, "-m", "sdmerge", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "a.txt: is not UTF-8" in lines[0]
    assert "broken.png: cannot be read" in lines[1]
    assert lines[2].startswith("error: the data has 2 problems")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
