"""DreamBooth: pictures of the class, given or painted; the LoRA of what it changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import sdmerge
from benchmarks import concept
from sdmerge.errors import RequestError
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path


def test_missing_pictures_of_the_class_are_painted(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    given = concept.write(concept.known(1, seed=4), tmp_path / "class")
    values = {"class_data": str(given), "class_prompt": "a red heart", "class_images": 3, "sample_steps": 2}
    run = runs.trained("dreambooth", toy, diamonds, tmp_path / "o", steps=1, **values)
    assert len(list(given.glob("*.png"))) == 3
    assert [len(source.items) for source in run.sources] == [8, 3]
    assert {item.caption for item in run.sources[1].items if item.path.name.startswith("class-")} == {"a red heart"}
    with Image.open(given / "class-00001.png") as one, Image.open(given / "class-00002.png") as other:
        assert one.size == (64, 64)
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() > 1


def test_one_folder_may_hold_both(toy: Path, tmp_path: Path) -> None:
    concept.write(concept.diamonds(2, seed=1), tmp_path / "data" / "instance")
    concept.write(concept.known(3, seed=4), tmp_path / "data" / "class")
    run = runs.trained("dreambooth", toy, tmp_path / "data", tmp_path / "o", steps=1, prior_weight=0.5)
    assert [(len(source.items), part.weight) for source, part in zip(run.sources, run.parts, strict=True)] == [
        (2, 1.0),
        (3, 0.5),
    ]
    with pytest.raises(RequestError, match="class_data"):
        runs.trained("dreambooth", toy, tmp_path / "data" / "instance", tmp_path / "p", steps=1, class_prompt="a dog")


def test_the_lora_of_the_change(single: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    values = {"model_config": str(concept.TINY / "config"), "dtype": "fp32"}
    modules = r"unet\..*attentions.*to_[qkv]\.weight"
    run = runs.trained(
        "dreambooth", single, diamonds, output, steps=3, lr=1e-3, modules=modules, extract="rank=48", **values
    )
    baked = tmp_path / "baked.safetensors"
    sdmerge.bake(single, [tmp_path / "tuned-lora.safetensors"], output=baked, dtype="fp32")
    again = load(ModelSettings(model=str(baked), model_config=values["model_config"]))
    assert (runs.painted(again) - runs.painted(run.networks)).abs().max() < 2e-3  # the factors are in half precision
    base = load(ModelSettings(model=str(single), model_config=values["model_config"]))
    assert (runs.painted(base) - runs.painted(run.networks)).abs().max() > 2e-2
    with pytest.raises(RequestError, match="rank=N"):
        runs.trained("dreambooth", single, diamonds, tmp_path / "x.safetensors", extract="64", **values)
