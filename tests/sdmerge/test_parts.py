"""Taking models apart and putting them together: the same model again, a part in another's place, and what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdformats.layout import SINGLE_FILE
from sdformats.renamed import spelled
from sdmerge import api
from sdmerge.errors import FamilyError, MismatchError, RequestError
from tests import tiny
from tests.formats.test_keymap import Named
from tests.formats.test_keymap import loaded as read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Single files, by family."""
    root = tmp_path_factory.mktemp("files")
    for family in FAMILIES:
        made = read(spelled(Named(tiny.tensors(family)), SINGLE_FILE))
        save_file(
            {name: value.clone() for name, value in made.items()} | {"betas": torch.rand(10)},
            root / f"{family}.safetensors",
        )
    return {family: root / f"{family}.safetensors" for family in FAMILIES}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_taken_apart_is_put_together_again(family: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    reports = api.split(files[family], tmp_path / "parts")
    made = {report.output.stem: load_file(report.output) for report in reports}
    assert made.keys() == {*tiny.components(family), "sdmerge_extras"}
    assert "encoder.mid.attn_1.q.weight" in made["vae"]
    for name, tensors in made.items():
        if name.startswith("text_encoder"):
            assert "shared.weight" in tensors or "text_model.encoder.layers.0.mlp.fc1.weight" in tensors
    assert made["sdmerge_extras"].keys() == {"betas"}
    api.join([report.output for report in reports], tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), load_file(files[family]))


def changed(source: Path, prefix: str, target: Path) -> Path:
    """Write a model in which a part has other numbers."""
    tensors = load_file(source)
    save_file({name: value + 1 if name.startswith(prefix) else value for name, value in tensors.items()}, target)
    return target


def test_a_vae_takes_another_s_place(files: Mapping[str, Path], tmp_path: Path) -> None:
    other = changed(files["sdxl"], "", tmp_path / "other.safetensors")
    api.split(other, tmp_path / "parts")
    expected = changed(files["sdxl"], "first_stage_model.", tmp_path / "expected.safetensors")
    for i, part in enumerate((tmp_path / "parts" / "vae.safetensors", f"vae={other}")):
        api.join([files["sdxl"], part], tmp_path / f"{i}.safetensors")
        assert same(load_file(tmp_path / f"{i}.safetensors"), load_file(expected))


@pytest.mark.parametrize(
    ("component", "prefix"),
    [("text_encoder", "conditioner.embedders.0."), ("text_encoder_2", "conditioner.embedders.1.")],
)
def test_an_encoder_finds_its_place_by_its_width(
    component: str, prefix: str, files: Mapping[str, Path], tmp_path: Path
) -> None:
    other = changed(files["sdxl"], "", tmp_path / "other.safetensors")
    api.split(other, tmp_path / "parts")
    encoder = tmp_path / "encoder.safetensors"
    save_file(
        load_file(tmp_path / "parts" / f"{component}.safetensors"), encoder
    )  # under another name, without metadata
    api.join([files["sdxl"], encoder], tmp_path / "out.safetensors")
    expected = changed(files["sdxl"], prefix, tmp_path / "expected.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), load_file(expected))


def test_an_encoder_with_openclip_s_names_is_taken(files: Mapping[str, Path], tmp_path: Path) -> None:
    prefix = "conditioner.embedders.1.model."
    bare = {
        name.removeprefix(prefix): value + 1
        for name, value in load_file(files["sdxl"]).items()
        if name.startswith(prefix)
    }
    save_file(bare, tmp_path / "encoder.safetensors")
    api.join([files["sdxl"], tmp_path / "encoder.safetensors"], tmp_path / "out.safetensors")
    expected = changed(files["sdxl"], prefix, tmp_path / "expected.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), load_file(expected))


def test_parts_of_sd3_must_be_named_where_nothing_tells(files: Mapping[str, Path], tmp_path: Path) -> None:
    parts = {report.output.stem: report.output for report in api.split(files["sd3"], tmp_path / "parts")}
    for path in parts.values():
        save_file(load_file(path), path)
    with pytest.raises(
        RequestError, match=r"may be several text encoders; say which it is: text_encoder=text_encoder\.saf"
    ):
        api.join([parts["transformer"], parts["vae"], parts["text_encoder"]], tmp_path / "out.safetensors")
    named = [f"{name}={parts[name]}" for name in ("text_encoder", "text_encoder_2")]
    given = [parts["transformer"], parts["vae"], *named]
    api.join([*given, parts["text_encoder_3"]], tmp_path / "out.safetensors")
    expected = {name: value for name, value in load_file(files["sd3"]).items() if name != "betas"}
    assert same(load_file(tmp_path / "out.safetensors"), expected)
    api.join(given, tmp_path / "without.safetensors")  # SD3 is complete without T5
    assert len(load_file(tmp_path / "without.safetensors")) < len(expected)


def test_a_folder_is_written_where_the_name_has_no_ending(files: Mapping[str, Path], tmp_path: Path) -> None:
    reports = api.split(files["sdxl"], tmp_path / "parts")
    api.join([report.output for report in reports], tmp_path / "folder")
    assert (tmp_path / "folder" / "model_index.json").is_file()
    api.split(tmp_path / "folder", tmp_path / "again")
    for report in reports:
        assert same(load_file(tmp_path / "again" / report.output.name), load_file(report.output))


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        (["sd1", "sdxl"], FamilyError, "is sdxl, and .* is sd1; parts of different families make no model"),
        (["sd1", "sd1"], RequestError, "is a second whole model; say what to take of it, as vae="),
        (["sd1", "vae=flux"], FamilyError, "is flux"),
        (["sd1", "text_encoder_2=sd1"], RequestError, r"has no text_encoder_2 \(expected one of"),
        (["sd1/vae"], RequestError, "there is no network among the parts"),
        (["sd1/unet", "sd1/vae"], MismatchError, "the parts have no text_encoder, which a sd1 model needs"),
        (["sd1", "sd3/vae"], MismatchError, r"its vae has no (post_)?quant_conv"),
        (["sdxl/unet", "sdxl/vae", "sdxl/text_encoder", "text_encoder_2=sdxl-refiner/text_encoder_2"], None, ""),
        (["sd1/unet", "sd1/vae", "text_encoder=sdxl/text_encoder_2"], MismatchError, "made for text of width 12, .* have 16"),
        (["flux/transformer", "sd1/vae", "flux/text_encoder", "flux/text_encoder_2"], MismatchError, "latents of width 16"),
        (["sd1", "sd3/text_encoder_3"], RequestError, r"cannot be text_encoder_3 \(expected one of none\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    parts: list[str], error: Any, said: str, files: Mapping[str, Path], tmp_path: Path
) -> None:
    for family in {part.rpartition("=")[2].partition("/")[0] for part in parts if "/" in part}:
        api.split(files[family], tmp_path / family)

    def path_of(part: str) -> str:
        named, equals, name = part.rpartition("=")
        path = tmp_path / f"{name}.safetensors" if "/" in name else files[name]
        return f"{named}{equals}{path}"

    out = tmp_path / "out.safetensors"
    if error is None:
        api.join([path_of(part) for part in parts], out)
        return
    with pytest.raises(error, match=said):
        api.join([path_of(part) for part in parts], out)
    assert not out.exists()


def test_only_whole_models_are_taken_apart(files: Mapping[str, Path], tmp_path: Path) -> None:
    api.split(files["sd1"], tmp_path / "parts")
    with pytest.raises(RequestError, match=r"vae\.safetensors: is vae, and cannot be taken apart"):
        api.split(tmp_path / "parts" / "vae.safetensors", tmp_path / "again")
    with pytest.raises(Exception, match="exists already"):
        api.split(files["sd1"], tmp_path / "parts")
    assert api.split(files["sd1"], tmp_path / "dry", dry_run=True)
    assert not (tmp_path / "dry").exists()
