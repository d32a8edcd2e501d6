"""Conversions of one part of a model, into other containers and types; and what is refused."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdformats.errors import CorruptFile, FormatError
from sdmerge import api
from sdmerge.errors import FamilyError, RequestError
from tests.sdmerge.converted import config_of, everything, same

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.sdmerge.converted import Tensors


@pytest.mark.parametrize("only", ["unet", "te", "vae"])
@pytest.mark.parametrize("spelling", ["single-file", "diffusers"])
def test_one_part_of_either(
    only: Any, spelling: str, files: Mapping[str, Path], folders: Mapping[str, Path], tmp_path: Path
) -> None:
    beginnings = {"unet": "unet.", "te": "text_encoder", "vae": "vae."}[only]
    expected = {name: value for name, value in everything(folders["sdxl"]).items() if name.startswith(beginnings)}
    for source in (files["sdxl"], folders["sdxl"]):
        out = tmp_path / f"{source.name}-part"
        if spelling == "diffusers":
            api.convert(source, out, to=spelling, only=only)
            assert same(everything(out), expected)
            assert not (out / "model_index.json").exists()
            continue
        out = out.with_suffix(".safetensors")
        api.convert(source, out, to=spelling, only=only)
        whole, made = load_file(files["sdxl"]), load_file(out)
        prefix = {"unet": "model.diffusion_model.", "te": "conditioner.", "vae": "first_stage_model."}[only]
        part = {name: value for name, value in whole.items() if name.startswith(prefix)}
        if only == "vae":
            part = {name.removeprefix(prefix): value for name, value in part.items()}
        assert same(made, part)


def test_a_vae_alone_needs_a_family_for_its_config(files: Mapping[str, Path], tmp_path: Path) -> None:
    api.convert(files["sdxl"], tmp_path / "whole.safetensors", only="vae")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "vae.safetensors")  # no metadata
    with pytest.raises(FamilyError, match="nothing tells its family, which its config depends on; give --family"):
        api.convert(tmp_path / "vae.safetensors", tmp_path / "b", to="diffusers")
    api.convert(tmp_path / "vae.safetensors", tmp_path / "b", to="diffusers", family="sdxl")
    assert config_of(tmp_path / "b", "vae")["scaling_factor"] == 0.13025


def test_a_component_s_own_file_becomes_a_single_file(
    folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path
) -> None:
    api.convert(folders["flux"] / "transformer", tmp_path / "a.safetensors", to="single-file")
    whole = load_file(files["flux"])
    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    assert same(load_file(tmp_path / "a.safetensors"), bare)
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    assert same(
        everything(tmp_path / "b"),
        {k: v for k, v in everything(folders["flux"]).items() if k.startswith("transformer.")},
    )
    api.convert(folders["flux"] / "transformer", tmp_path / "c", to="diffusers")
    assert same(everything(tmp_path / "c"), everything(tmp_path / "b"))


def test_a_ckpt_is_what_torch_loads(folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path) -> None:
    api.convert(folders["sd1"], tmp_path / "a.ckpt", to="single-file")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert same(found, load_file(files["sd1"]))
    api.convert(tmp_path / "a.ckpt", tmp_path / "b", to="diffusers")
    assert same(everything(tmp_path / "b"), everything(folders["sd1"]))


def fp8_of(tensors: Tensors, factors: Mapping[str, float]) -> Tensors:
    """Return a model with the matrices of its network in fp8, and factors as ``factors`` says by the ends of their names."""
    found = dict(tensors)
    for name, value in tensors.items():
        if (
            name.startswith(("model.diffusion_model.", "transformer."))
            and name.endswith(".weight")
            and value.dim() == 2
        ):
            module = name.removesuffix(".weight")
            factor = next((one for end, one in factors.items() if module.endswith(end)), 0.5)
            found[name] = (value.float() / factor).to(torch.float8_e4m3fn)
            found[f"{module}.scale_weight"] = torch.tensor(factor)
    return found


def test_fp8_weights_keep_their_factors_both_ways(files: Mapping[str, Path], tmp_path: Path) -> None:
    given = fp8_of(load_file(files["flux"]), {"qkv": 0.25})
    given["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(given, tmp_path / "a.safetensors")
    report = api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    assert any("which diffusers does not read; --dtype fp16 multiplies them" in note for note in report.notes)
    made = everything(tmp_path / "b")
    assert made["transformer.transformer_blocks.0.attn.to_k.scale_weight"] == 0.25
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), given)


def test_another_type_multiplies_the_factors(files: Mapping[str, Path], tmp_path: Path) -> None:
    given = fp8_of(load_file(files["flux"]), {})
    save_file(given, tmp_path / "a.safetensors")
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", dtype="fp16")
    made = everything(tmp_path / "b")
    assert not any("scale" in name for name in made)
    weight = given["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"].float() * 0.5
    assert torch.equal(made["transformer.transformer_blocks.0.attn.to_k.weight"], weight[16:32].half())


def test_factors_that_differ_need_another_type(folders: Mapping[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["flux"], tmp_path / "a")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    plain = {f"transformer.{name}": value for name, value in load_file(file).items()}
    given = fp8_of(plain, {"to_q": 0.25, "to_k": 0.5, "to_v": 0.125})
    save_file({name.removeprefix("transformer."): value for name, value in given.items()}, file)
    with pytest.raises(RequestError, match=r"have factors that differ .*qkv\.scale_weight.*--dtype"):
        api.convert(source, tmp_path / "b.safetensors", to="single-file")
    api.convert(source, tmp_path / "b.safetensors", to="single-file", dtype="fp32")
    made = load_file(tmp_path / "b.safetensors")["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    parts = [(f"transformer_blocks.0.attn.to_{x}.weight", f) for x, f in (("q", 0.25), ("k", 0.5), ("v", 0.125))]
    assert torch.equal(made, torch.cat([given[f"transformer.{name}"].float() * factor for name, factor in parts]))


def test_a_safety_checker_is_left_out_and_said(folders: Mapping[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sd1"], tmp_path / "a")
    (source / "safety_checker").mkdir()
    save_file({"concept_embeds": torch.ones(3)}, source / "safety_checker" / "model.safetensors")
    report = api.convert(source, tmp_path / "b.safetensors", to="single-file")
    assert "left out, as a single file has no place for it: safety_checker.concept_embeds" in report.notes
    save_file({"a": torch.ones(3)}, source / "unet" / "diffusion_pytorch_model.safetensors.x")
    odd = load_file(source / "unet" / "diffusion_pytorch_model.safetensors") | {"odd.weight": torch.ones(2)}
    save_file(odd, source / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RequestError, match=r"a single file has no name for unet\.odd\.weight; --allow-loss"):
        api.convert(source, tmp_path / "c.safetensors", to="single-file")
    api.convert(source, tmp_path / "c.safetensors", to="single-file", allow_loss=True)
    assert "odd" not in " ".join(load_file(tmp_path / "c.safetensors"))


def test_metadata_is_kept_without_what_is_no_longer_so(files: Mapping[str, Path], tmp_path: Path) -> None:
    texts = {"modelspec.title": "T", "modelspec.hash_sha256": "0x1", "sdmerge.recipe": "{}", "sdmerge.inputs": "[]"}
    save_file(load_file(files["sd1"]), tmp_path / "a.safetensors", metadata=texts)
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    with safe_open(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        found = file.metadata()
    assert found == {
        "modelspec.title": "T",
        "format": "pt",
        "sdmerge.before": '{"sdmerge.recipe":"{}","sdmerge.inputs":"[]"}',
    }


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        ({"to": "diffuser"}, "b", "is no layout of models .*; did you mean 'diffusers'"),
        ({"to": "diffusers"}, "b.safetensors", "the output is a folder"),
        ({"to": "single-file"}, "b", r"is no name for this output \(expected one that ends in .safetensors or .ckpt"),
        ({"shard_size": "1GB"}, "b.safetensors", "--shard-size is for folders, and the output is one file"),
        ({"tokenizer": "x"}, "b.safetensors", "--tokenizer is for folders"),
        ({"shard_size": "much", "to": "diffusers"}, "b", "size is 'much'"),
        ({"only": "te", "to": "single-file"}, "b", "is no name for this output"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], target: str, said: str, files: Mapping[str, Path], tmp_path: Path
) -> None:
    with pytest.raises((RequestError, FormatError), match=said):
        api.convert(files["sd1"], tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


def test_only_a_diffusers_folder_is_replaced(files: Mapping[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "b"
    api.convert(files["sd1"], out, to="diffusers")
    (out / "mine.txt").write_text("old")
    with pytest.raises(FormatError, match="exists already"):
        api.convert(files["sd1"], out, to="diffusers")
    api.convert(files["sd1"], out, to="diffusers", overwrite=True)
    assert not (out / "mine.txt").exists()
    (out / "model_index.json").unlink()
    with pytest.raises(FormatError, match="is no diffusers folder and is not replaced"):
        api.convert(files["sd1"], out, to="diffusers", overwrite=True)


def test_a_dry_run_writes_nothing(files: Mapping[str, Path], tmp_path: Path) -> None:
    report = api.convert(files["sdxl"], tmp_path / "b", to="diffusers", dry_run=True)
    assert not report.written
    assert list(tmp_path.iterdir()) == []


def test_a_cut_off_encoder_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sd2"], tmp_path / "a")
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CorruptFile, match=r"a: .*has no .*self_attn\.k_proj\.weight beside it"):
        api.convert(source, tmp_path / "b.safetensors", to="single-file")


def test_the_name_of_the_output_asks_for_a_single_file(folders: Mapping[str, Path], tmp_path: Path) -> None:
    api.convert(folders["sd1"], tmp_path / "told.safetensors", to="single-file")
    api.convert(folders["sd1"], tmp_path / "named.safetensors")
    assert (tmp_path / "named.safetensors").read_bytes() == (tmp_path / "told.safetensors").read_bytes()
    api.convert(folders["sd1"], tmp_path / "folder")
    assert (tmp_path / "folder" / "model_index.json").is_file()
