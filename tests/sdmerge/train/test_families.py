"""SD2 and SDXL: trained, written, read by diffusers; painted as diffusers paints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import sdmerge
from benchmarks import concept
from sdmerge.errors import RequestError
from sdmerge.sampling import Painting, paint
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from tests import tiny
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def text_encoder(tokenizer: Any, width: int, *, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=3, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def pipeline(family: str) -> Any:
    torch.manual_seed(11)
    tokenizer = CLIPTokenizer.from_pretrained(str(concept.TINY / "config" / "tokenizer"))
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    parts: dict[str, Any] = {
        "unet": tiny.unet(family).eval(),
        "vae": tiny.vae().eval(),
        "text_encoder": text_encoder(tokenizer, tiny.CONTEXT),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type=prediction),
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": text_encoder(tokenizer, tiny.WIDE, projected=True), "tokenizer_2": tokenizer}
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipeline(request.param).save_pretrained(folder)
    return folder


def test_a_single_file_is_described_by_what_it_carries(model: Path, tmp_path: Path) -> None:
    single = tmp_path / "single.safetensors"
    sdmerge.convert(model, single, to="single-file")
    tokenizer = {"tokenizer": str(model / "tokenizer")}
    one, other = load(ModelSettings(model=str(single), **tokenizer)), load(ModelSettings(model=str(model)))
    assert (runs.painted(one) - runs.painted(other)).abs().max() < 1e-5
    assert one.scheduler["prediction_type"] == other.scheduler["prediction_type"]
    with pytest.raises(RequestError, match="--tokenizer"):
        load(ModelSettings(model=str(single)))


def test_a_lora_is_read_by_diffusers(model: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    run = runs.trained(
        "lora",
        model,
        diamonds,
        output,
        steps=2,
        rank=2,
        lr=1e-2,
        text_encoder=True,
        targets="attention",
        to="diffusers",
    )
    family = run.networks.family
    assert family == model.parent.name.rstrip("0")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(model)
    pipe.load_lora_weights(str(tmp_path), weight_name=output.name)
    networks = load(ModelSettings(model=str(model)))
    before = runs.painted(networks)
    networks.unet, networks.texts[0].model = pipe.unet, pipe.text_encoder
    if family == "sdxl":
        networks.texts[1].model = pipe.text_encoder_2
    assert (runs.painted(networks) - before).abs().max() > 1e-4
    assert (runs.painted(networks) - runs.painted(run.networks)).abs().max() < 1e-5


def test_new_words_reach_every_encoder(model: Path, diamonds: Path, tmp_path: Path) -> None:
    run = runs.trained("custom-diffusion", model, diamonds, tmp_path / "d.bin", steps=2, lr=1e-2, init=("sks",))
    assert [text.width for text in run.networks.texts] == ([12, 16] if run.networks.family == "sdxl" else [12])
    assert {name for name in run.trained.parameters if name.startswith("te")} == {
        f"te{i}.<new1>" for i in range(1, len(run.networks.texts) + 1)
    }


def test_it_paints_what_diffusers_paints(model: Path) -> None:
    family = model.parent.name.rstrip("0")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
    if family == "sdxl":
        more |= {"original_size": (64, 64), "target_size": (64, 64)}
    theirs = pipe("a red heart", generator=torch.Generator().manual_seed(5), **more).images[0]
    painting = Painting(steps=3, guidance=4.0, width=64, height=64)
    [ours] = paint(load(ModelSettings(model=str(model))), ["a red heart"], [5], painting)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
