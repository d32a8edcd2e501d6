"""Merges of a folder with a single file: as if both were spelled as the first is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdformats.layout import SINGLE_FILE
from sdformats.renamed import spelled
from sdmerge import api
from sdmerge.comparison import diff
from sdmerge.errors import FamilyError
from sdmerge.verification import verify
from tests import tiny
from tests.formats.test_keymap import Named
from tests.formats.test_keymap import loaded as read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def saved(path: Path, family: str, shift: float) -> Path:
    """Write a single file whose numbers are shifted."""
    made = read(spelled(Named(tiny.tensors(family)), SINGLE_FILE))
    save_file({name: value + shift for name, value in made.items()}, path)
    return path


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(folder: Path) -> dict[str, Tensor]:
    return {f"{file.parent.name}.{n}": v for file in folder.rglob("*.safetensors") for n, v in load_file(file).items()}


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_the_output_follows_the_first_model(family: str, tmp_path: Path) -> None:
    a, b = (saved(tmp_path / f"{name}.safetensors", family, shift) for name, shift in (("a", 0.0), ("b", 0.5)))
    for file in (a, b):
        api.convert(file, tmp_path / file.stem, to="diffusers")
    report = api.weighted_sum([a, b], alpha=0.25, output=tmp_path / "plain.safetensors")
    mixed = api.weighted_sum([a, tmp_path / "b"], alpha=0.25, output=tmp_path / "mixed.safetensors")
    assert same(load_file(tmp_path / "mixed.safetensors"), load_file(tmp_path / "plain.safetensors"))
    assert mixed.counts == report.counts
    assert "B is spelled as diffusers: its tensors are taken under the names of single-file" in mixed.notes
    api.weighted_sum([tmp_path / "a", b], alpha=0.25, output=tmp_path / "folder")
    api.convert(tmp_path / "plain.safetensors", tmp_path / "expected", to="diffusers")
    assert same(everything(tmp_path / "folder"), everything(tmp_path / "expected"))
    assert verify(tmp_path / "mixed.safetensors").identical


def test_a_vae_is_taken_from_the_other_spelling(tmp_path: Path) -> None:
    a, b = (saved(tmp_path / f"{name}.safetensors", "sd1", shift) for name, shift in (("a", 0.0), ("b", 0.5)))
    api.convert(b, tmp_path / "b", to="diffusers")
    for i, vae in enumerate((b, tmp_path / "b", tmp_path / "b" / "vae")):
        api.weighted_sum([a, a], alpha=0.5, output=tmp_path / f"{i}.safetensors", vae=vae)
        assert same(load_file(tmp_path / f"{i}.safetensors"), load_file(tmp_path / "0.safetensors"))
    shifted = load_file(tmp_path / "2.safetensors")["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert torch.equal(shifted, load_file(b)["first_stage_model.encoder.mid.attn_1.q.weight"])


def test_a_moving_average_is_used_before_names_change(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", "sd1", 0.0)
    tensors = load_file(saved(tmp_path / "b.safetensors", "sd1", 0.25))
    network = {name: value for name, value in tensors.items() if name.startswith("model.diffusion_model.")}
    average = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v + 1 for n, v in network.items()}
    save_file(tensors | average, tmp_path / "b.safetensors")
    api.convert(a, tmp_path / "a", to="diffusers")
    api.weighted_sum([tmp_path / "a", tmp_path / "b.safetensors"], alpha=1.0, output=tmp_path / "c", ema="use")
    name = "input_blocks.1.0.in_layers.2.weight"
    made = everything(tmp_path / "c")["unet.down_blocks.0.resnets.0.conv1.weight"]
    assert torch.equal(
        made, average[f"model_ema.diffusion_model{name}".replace(".", "").replace("model_ema", "model_ema.", 1)]
    )


def test_other_families_are_still_refused(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.safetensors", "sd1", 0.0), saved(tmp_path / "b.safetensors", "sdxl", 0.0)
    api.convert(b, tmp_path / "b", to="diffusers")
    with pytest.raises(FamilyError, match="A is sd1 and B is sdxl"):
        api.weighted_sum([a, tmp_path / "b"], alpha=0.5, output=tmp_path / "c.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_a_folder_is_compared_with_a_single_file(family: str, tmp_path: Path) -> None:
    a, b = (saved(tmp_path / f"{name}.safetensors", family, shift) for name, shift in (("a", 0.0), ("b", 0.5)))
    for file in (a, b):
        api.convert(file, tmp_path / file.stem, to="diffusers")
    assert diff(a, tmp_path / "a").identical
    assert diff(tmp_path / "a", a).identical
    plain, mixed = diff(a, b), diff(a, tmp_path / "b")
    assert mixed.tensors == plain.tensors
    assert "B is spelled as diffusers: its tensors are taken under the names of single-file" in mixed.notes
    assert not diff(tmp_path / "a", b).identical


def test_other_families_are_not_compared_in_any_spelling(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.safetensors", "sd1", 0.0), saved(tmp_path / "b.safetensors", "sdxl", 0.0)
    api.convert(b, tmp_path / "b", to="diffusers")
    with pytest.raises(FamilyError, match="A is sd1 and B is sdxl"):
        diff(a, tmp_path / "b")
