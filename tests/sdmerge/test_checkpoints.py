"""Whole models between single files and folders: diffusers loads what is written, and everything comes back bit for bit."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdformats.errors import FormatError
from sdmerge import api
from sdmerge.errors import RequestError
from tests import tiny
from tests.sdmerge.converted import FAMILIES, config_of, everything, same

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.sdmerge.converted import Tensors


def pipeline_of(family: str) -> Any:
    import diffusers

    return getattr(diffusers, tiny.PIPELINES[family])


def without_tokenizers(folder: Path) -> dict[str, Any]:
    """Return arguments that keep diffusers from looking for tokenizers."""
    index = json.loads((folder / "model_index.json").read_text())
    return dict.fromkeys(name for name in index if name.startswith("tokenizer"))


def loaded(folder: Path, **more: Any) -> Any:
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **more)


def assert_holds(pipeline: Any, family: str) -> None:
    """Check that every parameter of a pipeline is that of the model it was made of."""
    expected = tiny.components(family)
    found = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert found.keys() == expected.keys()
    for name, module in found.items():
        mine = {key: value.half().float() for key, value in expected[name].state_dict().items()}
        assert same({key: value.float() for key, value in module.state_dict().items()}, mine), name


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    return found


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flux"])
def test_diffusers_loads_the_single_file(family: str, folders: Mapping[str, Path], files: Mapping[str, Path]) -> None:
    made = pipeline_of(family).from_single_file(
        str(files[family]), config=str(folders[family]), local_files_only=True, **without_tokenizers(folders[family])
    )
    assert_holds(made, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_folder_which_is_as_it_was(
    family: str, folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path
) -> None:
    report = api.convert(files[family], tmp_path / "b", to="diffusers")
    assert report.family == family.removesuffix(".5")
    assert same(everything(tmp_path / "b"), everything(folders[family]))
    assert_holds(loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")), family)
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), load_file(files[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_come_back(family: str, folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path) -> None:
    """The single file's metadata carries what shapes do not tell."""
    report = api.convert(files[family], tmp_path / "b", to="diffusers")
    assert not any("assumes" in note for note in report.notes)
    for component in (*tiny.components(family), "scheduler"):
        mine, theirs = config_of(tmp_path / "b", component), config_of(folders[family], component)
        shared = mine.keys() & theirs.keys() - {"architectures", "feed_forward_proj"}
        assert len(shared) > 10 or component == "scheduler"
        plain = {key: theirs[key] for key in shared}
        assert {key: mine[key] for key in shared} == plain, component
    index, before = index_of(tmp_path / "b"), index_of(folders[family])
    assert index.items() >= {key: value for key, value in before.items() if not key.startswith("_diffusers")}.items()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_of_unknown_config_loads(family: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    save_file(load_file(files[family]), tmp_path / "a.safetensors")  # no metadata
    prediction = {"prediction": "v_prediction"} if family == "sd2" else {}
    report = api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", **prediction)  # type: ignore[arg-type]
    assert any("config.json assumes: vae: 4 groups in norms" in note for note in report.notes)
    assert_holds(loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")), family)


def original(files: Mapping[str, Path], family: str) -> Tensors:
    """Return a single file as it was published: with a moving average, a schedule, and what diffusers drops."""
    tensors = load_file(files[family])
    if family == "sd1":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7)[None]
    if family == "sd2":
        last = {n.replace("resblocks.2", "resblocks.3"): v + 1 for n, v in tensors.items() if "resblocks.2." in n}
        tensors |= last | {"cond_stage_model.model.text_projection": torch.randn(12, 12).half()}
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    average = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    return tensors | average | {"betas": torch.rand(10), "model_ema.decay": torch.tensor(0.5)}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_what_diffusers_drops_comes_back(family: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    given = original(files, family)
    save_file(given, tmp_path / "a.safetensors")
    report = api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", prediction="epsilon")
    assert any(
        note.startswith("diffusers has no place for it, kept in sdmerge_extras.safetensors: ") for note in report.notes
    )
    assert_holds(loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")), family)
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), given)
    api.convert(tmp_path / "b", tmp_path / "d")  # a folder keeps them too
    assert same(everything(tmp_path / "d"), everything(tmp_path / "b"))


@pytest.mark.parametrize(("ema", "shift"), [("drop", 0.0), ("use", 1.0)])
def test_a_moving_average_is_left_out_or_used(
    ema: Any, shift: float, files: Mapping[str, Path], tmp_path: Path
) -> None:
    given = original(files, "sd1")
    save_file(given, tmp_path / "a.safetensors")
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", ema=ema)
    made = everything(tmp_path / "b")
    plain = given["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    assert torch.equal(made["unet.down_blocks.0.resnets.0.conv1.weight"], plain + shift)
    assert not any("model_ema" in name for name in made)
    assert "sdmerge_extras.betas" in made


@pytest.mark.parametrize(
    ("family", "channels", "pipeline"),
    [
        ("sd1", 9, "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 9, "StableDiffusionInpaintPipeline"),
        ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
        ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
    ],
)
def test_variants_have_their_pipelines(
    family: str, channels: int, pipeline: str, files: Mapping[str, Path], tmp_path: Path
) -> None:
    given = load_file(files[family])
    first = "model.diffusion_model.input_blocks.0.0.weight"
    given[first] = torch.randn(8, channels, 3, 3).half()
    save_file(given, tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    made = loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b"))
    assert type(made).__name__ == pipeline
    assert torch.equal(made.unet.conv_in.weight.half(), given[first])
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), given)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_markers_become_the_scheduler_s_config(
    family: str, *, zero_snr: bool, files: Mapping[str, Path], tmp_path: Path
) -> None:
    markers = {"v_pred": torch.empty(0)} | ({"ztsnr": torch.empty(0)} if zero_snr else {})
    given = load_file(files[family]) | markers
    save_file(given, tmp_path / "a.safetensors")
    api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    config = loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")).scheduler.config
    assert config.prediction_type == "v_prediction"
    assert bool(config.get("rescale_betas_zero_snr")) == zero_snr
    assert (config.timestep_spacing == "trailing") == zero_snr
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), given)
    assert set(markers) <= {name.removeprefix("sdmerge_extras.") for name in everything(tmp_path / "b")}


def test_a_folder_s_scheduler_becomes_markers(folders: Mapping[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sdxl"], tmp_path / "a")
    config = config_of(source, "scheduler") | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    api.convert(source, tmp_path / "b.safetensors", to="single-file")
    made = load_file(tmp_path / "b.safetensors")
    assert made["v_pred"].shape == made["ztsnr"].shape == (0,)
    config |= {"prediction_type": "epsilon"}
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    api.convert(source, tmp_path / "c.safetensors", to="single-file")
    assert "v_pred" not in load_file(tmp_path / "c.safetensors")


def test_sd2_must_be_told_what_it_predicts(files: Mapping[str, Path], tmp_path: Path) -> None:
    save_file(load_file(files["sd2"]), tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="say --prediction epsilon or --prediction v_prediction"):
        api.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers")
    for prediction, size in (("epsilon", 64), ("v_prediction", 96)):
        out = tmp_path / prediction
        api.convert(tmp_path / "a.safetensors", out, to="diffusers", prediction=prediction)  # type: ignore[arg-type]
        assert config_of(out, "scheduler")["prediction_type"] == prediction
        assert config_of(out, "unet")["sample_size"] == size
    with pytest.raises(RequestError, match="flux models predict a flow"):
        api.convert(files["flux"], tmp_path / "f", to="diffusers", prediction="epsilon")


def save_tokenizer(folder: Path) -> Path:
    from transformers import CLIPTokenizer

    words = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "!</w>", "!"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_tokenizers_are_copied_and_the_whole_pipeline_loads(files: Mapping[str, Path], tmp_path: Path) -> None:
    own = save_tokenizer(tmp_path / "tokenizer")
    report = api.convert(files["sdxl"], tmp_path / "b", to="diffusers", tokenizer=own)
    assert not any("tokenizer" in note for note in report.notes)
    made = loaded(tmp_path / "b")
    assert_holds(made, "sdxl")
    assert made.tokenizer("a b").input_ids == made.tokenizer_2("a b").input_ids == [0, 2, 3, 1]
    assert made.tokenizer_2.pad_token == "!"
    assert made.tokenizer.pad_token != "!"
    api.convert(files["sdxl"], tmp_path / "c", to="diffusers", tokenizer=tmp_path / "b")
    for name in ("tokenizer", "tokenizer_2"):
        for file in (tmp_path / "b" / name).iterdir():
            assert (tmp_path / "c" / name / file.name).read_bytes() == file.read_bytes()


def test_a_lacking_tokenizer_is_said(files: Mapping[str, Path], tmp_path: Path) -> None:
    own = save_tokenizer(tmp_path / "tokenizer")
    report = api.convert(files["flux"], tmp_path / "b", to="diffusers", tokenizer=own)
    assert [note for note in report.notes if "tokenizer" in note] == [
        "tokenizer_2 is not in the folder: copy google/t5-v1_1-xxl's files into it, or give --tokenizer"
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="empty: holds no tokenizer"):
        api.convert(files["flux"], tmp_path / "c", to="diffusers", tokenizer=tmp_path / "empty")


def test_shards_are_found_by_diffusers_and_by_ourselves(
    folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path
) -> None:
    api.convert(files["sd3"], tmp_path / "b", to="diffusers", shard_size="20KB")
    made = sorted(path.name for path in (tmp_path / "b" / "transformer").iterdir())
    assert made[0] == "config.json"
    assert made[1].startswith("diffusion_pytorch_model-00001-of-0000")
    assert made[-1] == "diffusion_pytorch_model.safetensors.index.json"
    assert (tmp_path / "b" / "text_encoder_3" / "model.safetensors.index.json").is_file()
    for file in (tmp_path / "b").rglob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 20_000
    assert same(everything(tmp_path / "b"), everything(folders["sd3"]))
    assert_holds(loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")), "sd3")
    api.convert(tmp_path / "b", tmp_path / "c.safetensors", to="single-file")
    assert same(load_file(tmp_path / "c.safetensors"), load_file(files["sd3"]))


def test_a_folder_is_sharded_and_put_together_again(folders: Mapping[str, Path], tmp_path: Path) -> None:
    api.convert(folders["sd1"], tmp_path / "b", shard_size="10KB")
    assert len(list((tmp_path / "b" / "unet").glob("*.safetensors"))) > 3
    assert_holds(loaded(tmp_path / "b", **without_tokenizers(tmp_path / "b")), "sd1")
    api.convert(tmp_path / "b", tmp_path / "c")
    assert same(everything(tmp_path / "c"), everything(folders["sd1"]))
    assert not list((tmp_path / "c").rglob("*.index.json"))
