"""``sdmerge sample``: what diffusers paints, with adapters and recipes merged in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import sdmerge
from sdmerge import cli, contact_sheet, demo
from sdmerge.errors import RequestError
from sdmerge.memory import merged
from sdmerge.options import Options
from sdmerge.recipe import Addition, Input, Model, Recipe
from sdmerge.sampling import Painting, paint
from sdmerge.train.loading import load
from sdmerge.train.log import Silent
from sdmerge.train.settings import ModelSettings

if TYPE_CHECKING:
    from pathlib import Path

TINY = demo.find_models()
CONFIG = TINY / "config"
PROMPTS = ("a large red star in the center, cream background", "a small blue heart")
SETTINGS = ModelSettings(model=str(TINY / demo.SHAPE), model_config=str(CONFIG))


def values(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def lora_file(folder: Path) -> Path:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    source = torch.Generator().manual_seed(0)
    shapes = {"lora_up.weight": (32, 4), "lora_down.weight": (4, 48)}
    tensors = {f"{module}.{end}": torch.randn(shape, generator=source) * 0.2 for end, shape in shapes.items()}
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def request(output: Path, **changes: Any) -> contact_sheet.Request:
    given: dict[str, Any] = {
        "model": SETTINGS,
        "output": output,
        "prompts": PROMPTS[:1],
        "seeds": (1,),
        "painting": Painting(steps=2),
        "device": "cpu",
    }
    return contact_sheet.Request(**{**given, **changes})


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_it_paints_what_diffusers_paints(guidance: float) -> None:
    pipe = demo.load_pipeline(TINY / demo.SHAPE, CONFIG)
    seeds = [3, 4]
    theirs = [
        pipe(
            prompt, num_inference_steps=6, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    ours = paint(load(SETTINGS), PROMPTS, seeds, Painting(steps=6, guidance=guidance))
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(values(one) - values(other)).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, beside this numpy
@pytest.mark.parametrize("scheduler", ["euler", "dpm++"])
def test_other_schedulers_paint_something_like_it(scheduler: str) -> None:
    networks = load(SETTINGS)
    first = paint(networks, PROMPTS[:1], [3], Painting(steps=25, guidance=4.5))[0]
    other = paint(networks, PROMPTS[:1], [3], Painting(steps=25, guidance=4.5, scheduler=scheduler))[0]
    assert np.abs(values(first) - values(other)).mean() < 60
    with pytest.raises(RequestError, match="scheduler"):
        paint(networks, PROMPTS[:1], [3], Painting(scheduler="none"))


def test_merged_in_memory_is_what_is_written(tmp_path: Path) -> None:
    lora = lora_file(tmp_path)
    recipe = Recipe(Model("A", (Addition("L", 0.5),)), {"A": Input(TINY / demo.BASE), "L": Input(lora)})
    sdmerge.bake(TINY / demo.BASE, [(lora, 0.5)], output=tmp_path / "o.safetensors")
    [made] = list(merged([recipe], Options()))
    written = load_file(tmp_path / "o.safetensors")
    assert set(made.specs) == set(written)
    for name, tensor in written.items():
        assert bytes(made.read(name)) == tensor.numpy().tobytes(), name


def test_a_sweep_of_a_recipe_paints_each_merge(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"models: {{a: {TINY / demo.SHAPE}, b: {TINY / demo.BASE}}}\nset: {{alpha: 0.7}}\n"
        "merge: {method: weighted_sum, models: [a, b], parameters: {alpha: $alpha}}\n"
    )
    output = tmp_path / "grid.png"
    model = ModelSettings(model="", model_config=str(CONFIG))
    size = contact_sheet.sample(request(output, model=model, recipe=recipe, over={"alpha": [0.0, 1.0]}), Silent())
    assert size == (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "r.yaml"]
    cell = 192
    with Image.open(output) as sheet:
        shown = [sheet.crop((10 + i * (cell + 10), 94, 10 + i * (cell + 10) + cell, 94 + cell)) for i in range(2)]
        assert sheet.size[0] == 10 + 2 * (cell + 10)
    for image, file in zip(shown, (demo.SHAPE, demo.BASE), strict=True):
        networks = load(ModelSettings(model=str(TINY / file), model_config=str(CONFIG)))
        alone = paint(networks, PROMPTS[:1], [1], Painting(steps=2))[0]
        resized = alone.resize((cell, cell), Image.Resampling.BICUBIC)
        assert np.abs(values(image) - values(resized)).mean() < 1


def test_axes_are_arranged_as_asked_for(tmp_path: Path) -> None:
    lora = lora_file(tmp_path)
    output = tmp_path / "grid.png"
    asked = request(output, adapters=((lora, 0.5),), strengths=(0.0, 1.0), seeds=(1, 2, 3), prompts=PROMPTS)
    assert contact_sheet.sample(asked, Silent()) == (6, 2)
    many = request(
        output, adapters=((lora, 0.5),), strengths=(0.0, 1.0), seeds=(1, 2, 3), grid="strength:seed", overwrite=True
    )
    assert contact_sheet.sample(many, Silent()) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"grid": "seed:prmpt"}, "did you mean 'prompt'"),
        ({"seeds": (1, 2), "grid": ":prompt"}, "each axis"),
        ({"strengths": (0.5,)}, "for adapters"),
        ({"over": {"alpha": [1.0]}}, "change a recipe"),
        ({"painting": Painting(width=30, steps=1)}, "multiples"),
        ({"seeds": tuple(range(500))}, "500 pictures"),
        ({"model": ModelSettings(model=str(TINY / demo.SHAPE))}, "--model-config"),
        (
            {"model": ModelSettings(model=str(TINY / demo.SHAPE), model_config=str(CONFIG), tokenizer=str(TINY))},
            "--tokenizer",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_painted_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        contact_sheet.sample(request(tmp_path / "o.png", **changes), Silent())
    assert list(tmp_path.iterdir()) == []


def test_by_command(tmp_path: Path) -> None:
    output = tmp_path / "o.png"
    args = ["sample", str(TINY / demo.SHAPE), "--model-config", str(CONFIG), "-p", "a red star", "--seeds", "1-2"]
    done = CliRunner().invoke(cli.root, [*args, "--steps", "1", "--device", "cpu", "-o", str(output)])
    assert done.exit_code == 0, done.output
    with Image.open(output) as sheet:
        assert sheet.size[0] > 2 * 192
    assert CliRunner().invoke(cli.root, [*args, "--seeds", "a", "-o", str(output)]).exit_code == 2
    assert CliRunner().invoke(cli.root, [*args, "--size", "64", "-o", str(output)]).exit_code == 2
