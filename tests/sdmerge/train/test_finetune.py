"""Fine-tuning: the written model is the trained one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import diffusers
import torch
from safetensors.torch import load_file

from benchmarks import concept
from sdformats.files import open_source
from sdmerge.demo import load_pipeline
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path


def test_the_written_model_is_the_trained_one(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    run = runs.trained("finetune", toy, diamonds, output, steps=3, lr=1e-3, text_encoder=True)
    again = load(ModelSettings(model=str(output), tokenizer=str(toy / "tokenizer")))
    assert (runs.painted(again) - runs.painted(run.networks)).abs().max() == 0
    unet = diffusers.UNet2DConditionModel.from_pretrained(output / "unet")
    again.unet = unet
    assert (runs.painted(again) - runs.painted(run.networks)).abs().max() < 1e-5
    with open_source(output) as source:
        told = json.loads(source.metadata["sdmerge.training"])
    assert (told["method"], told["step"], told["data"]) == ("finetune", 3, diamonds.name)
    assert str(tmp_path) not in json.dumps(dict(source.metadata))


def test_a_single_file_stays_one(single: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    values = {"model_config": str(concept.TINY / "config")}
    run = runs.trained(
        "finetune", single, diamonds, output, steps=3, lr=1e-3, text_encoder=True, dtype="fp32", **values
    )
    assert load_file(output).keys() == load_file(single).keys()
    again = load(ModelSettings(model=str(output), **values))
    assert (runs.painted(again) - runs.painted(run.networks)).abs().max() == 0
    pipe = load_pipeline(output, concept.TINY / "config")
    again.unet, again.texts[0].model = pipe.unet, pipe.text_encoder
    assert (runs.painted(again) - runs.painted(run.networks)).abs().max() < 1e-5


def test_a_pattern_picks_what_is_trained(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    runs.trained("finetune", toy, diamonds, output, steps=2, lr=1e-3, modules=r"unet\..*attn2.*", dtype="fp16")
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(toy / name), load_file(output / name)
    assert all(one.dtype == torch.float16 for one in after.values())
    changed = {name for name, one in before.items() if not torch.equal(one.half(), after[name])}
    assert changed
    assert all("attn2" in name for name in changed)
