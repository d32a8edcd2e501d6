"""The tiny models are what they claim to be, and the merged one knows what both fine-tunes learned."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdmerge
from sdformats.errors import WriteError
from sdmerge import demo
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny"
NAMES = (demo.SHAPE, demo.TEXTURE, demo.BASE)

for _name in ("diffusers", "transformers", "PIL"):
    pytest.importorskip(_name, reason="the extra `demo` is not installed")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Load modules of examples/, which is a folder of scripts and no package."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name in loaded:
            return loaded[name]
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        loaded[name] = sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> demo.DemoResult:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return demo.run_demo(folder, models=TINY, prompts=demo.PROMPTS[:2], steps=2)


@dataclass
class Concept:
    """Held-out noisy latents of one concept, several steps of the noise each, and the noise to be found."""

    noisy: torch.Tensor
    steps: torch.Tensor
    context: torch.Tensor
    noise: torch.Tensor

    @torch.no_grad()
    def loss(self, unet: Any) -> float:
        found = unet(self.noisy, self.steps, self.context).sample
        return float((found - self.noise).square().mean())


def held_out(shapes: Any, pipeline: Any, kinds: tuple[str, ...], textures: tuple[str, ...], seed: int) -> Concept:
    rng = np.random.default_rng([seed, 999_331])
    scenes = [shapes.sample(rng, kinds, textures) for _ in range(24)]
    pictures = torch.from_numpy(shapes.draw(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = pipeline.tokenizer(
        [scene.caption() for scene in scenes], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    levels = (100, 300, 500, 700, 900)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mean * pipeline.vae.config.scaling_factor
        context = pipeline.text_encoder(ids).last_hidden_state.repeat(len(levels), 1, 1)
    latents = latents.repeat(len(levels), 1, 1, 1)
    steps = torch.tensor(levels).repeat_interleave(len(scenes))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return Concept(pipeline.scheduler.add_noise(latents, noise, steps), steps, context, noise)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base with a LoRA of rank 8 of each fine-tune, and the texture model with that of the shape."""
    folder = tmp_path_factory.mktemp("extracted")
    loras = {name: folder / f"{name}.safetensors" for name in ("shape", "texture")}
    for name, lora in loras.items():
        sdmerge.extract_lora(TINY / f"tiny-{name}.safetensors", TINY / demo.BASE, lora, rank=8, to="lycoris")
    pairs = {
        "shape of rank 8": (demo.BASE, "shape"),
        "texture of rank 8": (demo.BASE, "texture"),
        "moved": (demo.TEXTURE, "shape"),
    }
    for name, (model, lora) in pairs.items():
        sdmerge.bake(TINY / model, [loras[lora]], output=folder / f"baked {name}.safetensors")
    return {name: folder / f"baked {name}.safetensors" for name in pairs}


@pytest.fixture(scope="module")
def losses(made: demo.DemoResult, extracted: dict[str, Path], example: Any) -> dict[str, dict[str, float]]:
    """Losses by concept and model."""
    shapes = example("shapes")
    paths = {
        "shape": TINY / demo.SHAPE,
        "texture": TINY / demo.TEXTURE,
        "base": TINY / demo.BASE,
        "merged": made.merged,
        **extracted,
    }
    pipelines = {name: demo.load_pipeline(path, TINY / "config") for name, path in paths.items()}
    known, star, striped = shapes.BASE_SHAPES, (shapes.NEW_SHAPE,), (shapes.NEW_TEXTURE,)
    concepts = {
        "shape": held_out(shapes, pipelines["base"], star, ("",), 1),
        "texture": held_out(shapes, pipelines["base"], known, striped, 2),
        "both": held_out(shapes, pipelines["base"], star, striped, 3),
        "known": held_out(shapes, pipelines["base"], known, ("",), 4),
    }
    return {
        concept: {name: data.loss(pipeline.unet) for name, pipeline in pipelines.items()}
        for concept, data in concepts.items()
    }


@pytest.mark.parametrize(("learned", "other"), [("shape", "texture"), ("texture", "shape")])
def test_merged_is_nearer_to_each_fine_tune_than_the_other_is(
    losses: dict[str, dict[str, float]], learned: str, other: str
) -> None:
    of = losses[learned]
    assert abs(of["merged"] - of[learned]) < 0.5 * abs(of[other] - of[learned])


@pytest.mark.parametrize("learned", ["shape", "texture"])
def test_each_fine_tune_learned_what_the_base_does_not_know(losses: dict[str, dict[str, float]], learned: str) -> None:
    assert losses[learned][learned] < 0.8 * losses[learned]["base"]


@pytest.mark.parametrize("learned", ["shape", "texture"])
def test_a_lora_of_rank_8_keeps_nine_tenths_of_the_gain(losses: dict[str, dict[str, float]], learned: str) -> None:
    of = losses[learned]
    assert of["base"] - of[f"{learned} of rank 8"] >= 0.9 * (of["base"] - of[learned])


def test_an_extracted_lora_brings_its_concept_to_another_model(losses: dict[str, dict[str, float]]) -> None:
    assert losses["shape"]["moved"] < 0.5 * losses["shape"]["texture"]
    assert losses["both"]["moved"] < 0.9 * losses["both"]["texture"]


def test_merged_paints_both_at_once_better_than_anyone(losses: dict[str, dict[str, float]]) -> None:
    of = losses["both"]
    assert of["merged"] < 0.9 * min(of["shape"], of["texture"], of["base"])


def test_merged_forgets_little(losses: dict[str, dict[str, float]]) -> None:
    of = losses["known"]
    assert of["merged"] < 1.5 * of["base"]
    # What it forgets is a small part of what it learned.
    assert of["merged"] - of["base"] < 0.15 * (losses["shape"]["base"] - losses["shape"]["merged"])


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_every_parameter_of_the_single_file(name: str, example: Any) -> None:
    file = load_file(TINY / name)
    pipeline = demo.load_pipeline(TINY / name, TINY / "config")
    back = example("singlefile").single_file(
        pipeline.unet.state_dict(), pipeline.vae.state_dict(), pipeline.text_encoder.state_dict()
    )
    assert back.keys() == file.keys()
    assert [key for key in file if not torch.equal(back[key], file[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_small_and_say_what_they_are(name: str) -> None:
    assert (TINY / name).stat().st_size <= 10_000_000
    with safe_open(TINY / name, "pt") as file:
        metadata = file.metadata()
        position = file.get_tensor("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.license"] == "Apache-2.0"
    assert (position.dtype, tuple(position.shape)) == (torch.int64, (1, 77))


def test_the_three_have_the_counts_of_sd1_and_differ_in_the_unet_only() -> None:
    shape, texture, base = (load_file(TINY / name) for name in NAMES)
    counts = {
        part: sum(key.startswith(part) for key in base) for part in ("model.diffusion_model.", "first_stage_model.")
    }
    assert counts == {"model.diffusion_model.": 686, "first_stage_model.": 248}
    for tuned in (shape, texture):
        assert {key: value.shape for key, value in tuned.items()} == {key: value.shape for key, value in base.items()}
        changed = {key.split(".")[0] for key in base if not torch.equal(base[key], tuned[key])}
        assert changed == {"model"}


def test_latents_have_unit_deviation(made: demo.DemoResult, example: Any) -> None:
    shapes = example("shapes")
    rng = np.random.default_rng(8)
    pictures = torch.from_numpy(shapes.draw([shapes.sample(rng) for _ in range(64)])).permute(0, 3, 1, 2) / 127.5 - 1
    vae = demo.load_pipeline(made.merged, TINY / "config").vae
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
        error = (vae.decode(latents / vae.config.scaling_factor).sample - pictures).abs().mean()
    assert 0.85 < float(latents.std()) < 1.15
    assert float(error) < 0.08


def test_every_word_of_a_prompt_is_one_token(example: Any) -> None:
    tokenizer = example("vocabulary").load_tokenizer(TINY / "config" / "tokenizer")
    for prompt in demo.PROMPTS:
        assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.replace(",", " ,").split()]


def test_the_image_tower_tells_shapes_apart(example: Any) -> None:
    import transformers

    shapes, tokenizer = example("shapes"), example("vocabulary").load_tokenizer(TINY / "config" / "tokenizer")
    model: Any = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(TINY / "config" / "clip"))
    model.eval()
    text = {
        key.removeprefix("cond_stage_model.transformer."): value
        for key, value in load_file(TINY / demo.BASE).items()
        if key.startswith("cond_stage_model.") and not key.endswith("position_ids")
    }
    state = {key: value.float() for key, value in (text | load_file(TINY / "image_tower.safetensors")).items()}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("position_ids") for key in missing.missing_keys)
    names = [*shapes.BASE_SHAPES, shapes.NEW_SHAPE]
    rng = np.random.default_rng(6)
    scenes = [shapes.sample(rng, [names[i % len(names)]]) for i in range(48)]
    pictures = torch.from_numpy(shapes.draw(scenes)).permute(0, 3, 1, 2) / 127.5 - 1
    right = 0
    for scene, picture in zip(scenes, pictures, strict=True):
        captions = [shapes.with_words(scene, shape=name).caption() for name in names]
        ids = tokenizer(captions, padding=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**ids, pixel_values=picture[None]).logits_per_image.argmax()
        right += names[int(best)] == scene.shape
    assert right >= 28  # one in eight would be 6


def test_the_grid_and_the_merge_are_written(made: demo.DemoResult) -> None:
    from PIL import Image

    assert made.paths == (made.merged, made.picture)
    with Image.open(made.picture) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 4 * 128
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    with safe_open(made.merged, "pt") as file:
        assert json.loads(file.metadata()["sdmerge.recipe"])


def test_the_merge_is_the_formula(made: demo.DemoResult) -> None:
    a, b, c, merged = (load_file(path) for path in (*(TINY / name for name in NAMES), made.merged))
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    wanted = (a[key].double() + (b[key].double() - c[key].double())).half()
    assert torch.equal(merged[key], wanted)
    assert not torch.equal(merged[key], a[key])


def test_models_are_found_in_the_checkout() -> None:
    assert demo.find_models().samefile(TINY)


def test_where_there_are_no_models_the_error_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "sdmerge" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"checkout of the repository.*train_tiny\.py") as caught:
        demo.run_demo(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(RequestError, match=r"sdmerge\[demo\]"):
        demo.run_demo(tmp_path / "out", models=TINY)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(WriteError, match="cannot be made"):
        demo.run_demo(tmp_path / "taken" / "out", models=TINY)


def test_the_demo_imports_nothing_heavy_before_it_runs() -> None:
    code = "import sys, sdmerge.demo; print([n for n in ('torch', 'diffusers', 'PIL') if n in sys.modules])"
    root = Path(sdmerge.__file__).parents[1]
    path = os.pathsep.join(str(root / name) for name in (".", "kernels", "formats"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
