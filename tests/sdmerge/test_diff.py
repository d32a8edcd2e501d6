"""``sdmerge diff``: what it prints, and its exit status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner, Result

from sdmerge import cli
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(toys.saved(tmp_path, name, seed)) for seed, name in enumerate("ab")]


def invoke(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.root, ["diff", *args], standalone_mode=False, catch_exceptions=False
    )


def test_blocks_tensors_and_a_verdict(models: list[str]) -> None:
    done = invoke(*models)
    assert done.return_value == 0
    for expected in ("IN00", "OUT11", "VAE", "te1", "all", "most changed", "distance", "cosine"):
        assert expected in done.stdout
    count = len(toys.shapes())
    assert f"different: {count} of {count + 1} tensors changed" in done.stdout


def test_top_says_how_many_tensors_are_listed(models: list[str]) -> None:
    assert invoke(*models, "--top", "0").stdout.count(toys.UNET) == 0
    listed = invoke(*models, "--top", "3").stdout
    assert listed.count(".weight") + listed.count(".bias") == 3


def test_identical_models(models: list[str]) -> None:
    done = invoke(models[0], models[0], "--exit-code")
    assert done.return_value == 0
    assert "identical: " in done.stdout
    assert "different" not in done.stdout


def test_exit_code_tells_only_where_asked(models: list[str]) -> None:
    assert invoke(*models).return_value == 0
    assert invoke(*models, "--exit-code").return_value == 1
    assert invoke(*models, "--exit-code", "--json").return_value == 1


def test_json_holds_every_tensor(models: list[str]) -> None:
    data = json.loads(invoke(*models, "--json", "--top", "1").stdout)
    assert (data["a"], data["b"], data["family"], data["identical"]) == (*models, "sd1", False)
    assert len(data["tensors"]) == len(toys.shapes()) + 1
    assert {"component", "block", "distance", "cosine"} <= data["blocks"][0].keys()


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    model = toys.toy(0)
    a = toys.save(tmp_path / "a.safetensors", {**model, **{f"extra.{i}": torch.zeros(1) for i in range(5)}})
    wide = {**model, toys.CONV_IN: torch.zeros(8, 9, 3, 3), toys.TO_K: model[toys.TO_K].float()}
    done = invoke(str(a), str(toys.save(tmp_path / "b.safetensors", wide)), "--top", "2")
    assert "5 tensors only A has" in done.stdout
    assert "... and 3 more" in done.stdout
    assert "1 tensors of another shape" in done.stdout
    assert "5 only A has, 1 of another shape, 2 of another type" in done.stdout
    assert "note: B holds F32 where A holds F16" in done.stderr


def test_small_shares_are_not_rounded_to_none_or_all(tmp_path: Path) -> None:
    large = torch.zeros(64, 64)
    few = large.clone()
    few[0, 0] = 1
    name = "input_blocks.1.0.in_layers.2.weight"
    a, b, c = (
        str(toys.save(tmp_path / f"{label}.safetensors", {"x.0.y": value, name: torch.ones(4, 4, 1, 1)}))
        for label, value in (("a", large), ("b", few), ("c", few + 1))
    )
    assert "<0.1 %" in invoke(a, b).stdout
    assert "100 %" in invoke(a, c).stdout
    most = large + 1
    most[0, 0] = 0
    assert ">99.9 %" in invoke(a, str(toys.save(tmp_path / "d.safetensors", {"x.0.y": most}))).stdout


def test_a_picture_on_request(tmp_path: Path, models: list[str]) -> None:
    target = tmp_path / "heat.png"
    done = invoke(*models, "--plot", str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "heat map written" in done.stderr
    with pytest.raises(SystemExit) as stopped:
        cli.main(["diff", *models, "--plot", str(target)])
    assert stopped.value.code == 1
    assert invoke(*models, "--plot", str(target), "--overwrite", "--quiet").stderr == ""


def test_errors_are_one_line(tmp_path: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    for args in (
        [models[0], str(tmp_path / "none.safetensors")],
        [str(tmp_path / "text.safetensors"), models[0]],
        [*models, "--family", "sd9"],
        [*models, "--plot", "heat.jpg"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["diff", *args])
        shown = capsys.readouterr()
        assert (stopped.value.code, shown.out, shown.err.count("\n")) == (1, "", 1), args
        assert shown.err.startswith("error: ")
