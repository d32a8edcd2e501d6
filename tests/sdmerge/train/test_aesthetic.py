"""Aesthetic gradients: what is painted comes nearer to the pictures, and the moved text encoder can be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

import sdmerge
from benchmarks import concept, embedding_effects
from sdmerge import train
from sdmerge.errors import RequestError
from sdmerge.train.clip import load_image_encoder
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from sdmerge.train.style import Style, mixed, moved, read, read_style

if TYPE_CHECKING:
    from pathlib import Path

    from sdmerge.train.networks import Networks

PROMPT = "a large red ring"


@pytest.fixture(scope="module")
def networks(toy: Path) -> Networks:
    return load(ModelSettings(model=str(toy)))


@pytest.fixture(scope="module")
def style(toy: Path) -> Style:
    encoder = embedding_effects.image_encoder(toy)
    return Style(
        embedding=torch.randn(48, generator=torch.Generator().manual_seed(2)), projection=encoder.text_projection
    )


def test_paintings_come_nearer(networks: Networks, toy: Path) -> None:
    encoder = embedding_effects.image_encoder(toy)
    found = embedding_effects.aesthetic(networks, encoder, 0, rate=3e-4)
    assert found["T = 5"] > found["T = 0"] + 0.1


def test_nothing_is_told_as_before(networks: Networks, style: Style) -> None:
    plain = networks.read(["", PROMPT])
    assert torch.equal(read(networks, "", style).context, networks.read([""]).context)
    assert (read(networks, PROMPT, style).context[0] - plain.context[1]).abs().max() > 1e-3
    assert torch.equal(networks.read(["", PROMPT]).context, plain.context)


def test_mixing() -> None:
    plain, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    empty = torch.zeros(1)
    line, arc = (Style(embedding=empty, weight=0.5, slerp=slerp) for slerp in (False, True))
    assert torch.equal(mixed(plain, far, line), torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(mixed(plain, far, arc), torch.tensor([[0.5**0.5, 2 * 0.5**0.5]]))
    torch.testing.assert_close(mixed(plain, plain, arc), plain)


def test_the_embedding_is_the_mean_of_what_transformers_says(toy: Path, tmp_path: Path) -> None:
    data = concept.write(concept.known(3, seed=2), tmp_path / "data")
    given = {"model_config": str(concept.TINY / "config"), "clip": str(embedding_effects.TOWER)}
    for name in ("style.pt", "style.safetensors"):
        train.run("aesthetic", model=str(toy), data=str(data), output=str(tmp_path / name), **given)
    found = torch.load(tmp_path / "style.pt", weights_only=True)
    assert torch.equal(read_style(tmp_path / "style.safetensors"), found[0])
    model = CLIPModel(CLIPConfig.from_pretrained(concept.TINY / "config" / "clip")).eval()
    model.load_state_dict(load_file(embedding_effects.TOWER), strict=False)
    pixels = torch.stack(
        [torch.from_numpy(one.pixels).permute(2, 0, 1) / 127.5 - 1 for one in concept.known(3, seed=2)]
    )
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixels.float()).pooler_output).mean(0)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("export", ["checkpoint", "diff", "lora"])
def test_the_moved_text_encoder_is_written(
    export: str, toy: Path, networks: Networks, style: Style, tmp_path: Path
) -> None:
    model = concept.TINY / "tiny-base.safetensors"
    file, made = tmp_path / "style.pt", tmp_path / "made.safetensors"
    torch.save(style.embedding[None].clone(), file)
    config = {"model_config": str(concept.TINY / "config")}
    given = {"style": str(file), "clip": str(embedding_effects.TOWER), "prompt": PROMPT, "export": export, "rank": 48}
    train.run("aesthetic", model=str(model), output=str(made), dtype="fp32", **config, **given)
    if export != "checkpoint":
        sdmerge.bake(model, [made], output=tmp_path / "baked.safetensors", dtype="fp32")
        made = tmp_path / "baked.safetensors"
    found = load(ModelSettings(model=str(made), **config)).texts[0].model.state_dict()
    wanted = moved(networks.texts[0], PROMPT, style).model.state_dict()
    before = networks.texts[0].model.state_dict()
    for name, tensor in wanted.items():
        left_out = (export == "lora" and tensor.dim() == 1) or (export != "checkpoint" and "embedding" in name)
        torch.testing.assert_close(found[name], before[name] if left_out else tensor, atol=2e-5, rtol=1e-3)


def test_what_is_missing_is_told(toy: Path, networks: Networks, tmp_path: Path) -> None:
    given = {"model": str(toy), "output": str(tmp_path / "o.pt")}
    with pytest.raises(RequestError, match="no image encoder of its own"):
        train.run("aesthetic", data=str(tmp_path), **given)
    clip = {"clip": str(embedding_effects.TOWER), "model_config": str(concept.TINY / "config")}
    with pytest.raises(RequestError, match="--data, or an embedding with --style"):
        train.run("aesthetic", **given, **clip)
    with pytest.raises(RequestError, match="for a prompt"):
        train.run("aesthetic", export="lora", **given, **clip)
    with pytest.raises(RequestError, match="no text encoder's features are"):
        read(networks, PROMPT, Style(embedding=torch.zeros(9)))
    with pytest.raises(RequestError, match="no image encoder that is known"):
        load_image_encoder(str(embedding_effects.TOWER), ModelSettings(model=str(toy)))
