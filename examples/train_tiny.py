"""Train the tiny models from scratch and write them: ``python examples/train_tiny.py --out examples/tiny``.

Everything is seeded and runs on one CPU thread; see README.md beside this file for what is made and how long it takes.
Finished stages are kept under ``--work`` and are not run again, so an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapes
import torch
import training
from models import new_autoencoder, new_clip, new_unet
from safetensors.torch import load_file, save_file
from singlefile import single_file
from vocabulary import load_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPModel, CLIPTokenizer

ALL_SHAPES = (*shapes.BASE_SHAPES, shapes.NEW_SHAPE)
TITLES = {
    "base": "Tiny shapes, base",
    "shape": f"Tiny shapes, fine-tuned on a new shape ({shapes.NEW_SHAPE})",
    "texture": f"Tiny shapes, fine-tuned on a new texture ({shapes.NEW_TEXTURE})",
}
STAGES = ("vae", "decoder", "clip", "base", "shape", "texture")


@dataclass(frozen=True)
class Lengths:
    """How long everything runs; the defaults made the published files."""

    pictures: int = 12000
    known: int = 8000
    concept: int = 3000
    vae: int = 1800
    decoder: int = 1600
    clip: int = 1200
    base: int = 12000
    tune: int = 1600

    def scaled(self, share: float) -> Lengths:
        """Return the same lengths, each multiplied by `share`, for trying things out."""
        return Lengths(**{name: max(16, round(value * share)) for name, value in vars(self).items()})


class Drawn(NamedTuple):
    """Pictures [n, 64, 64, 3], RGB bytes, with a caption each, and what they look like at a glance."""

    pictures: Tensor
    captions: list[str]
    groups: list[str]


class Workshop:
    """The data and the finished parts, each made when first needed.

    Args:
        out: where the published files go.
        work: where finished stages are kept.
        lengths: how long each stage runs.
        seed: the seed from which every other one is counted.
    """

    def __init__(self, out: Path, work: Path, lengths: Lengths, seed: int) -> None:
        self.out, self.work, self.lengths, self.seed = out, work, lengths, seed
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The vocabulary, learned from captions of everything that can be drawn."""
        folder = self.out / "config" / "tokenizer"
        if not (folder / "vocab.json").exists():
            captions = self.pictures("everything", ALL_SHAPES, ("", shapes.NEW_TEXTURE), 3000).captions
            write_tokenizer([*captions, shapes.OTHER_WORDS, shapes.OTHER_WORDS], folder)
        return load_tokenizer(folder)

    def pictures(self, name: str, kinds: tuple[str, ...], textures: tuple[str, ...], count: int) -> Drawn:
        """Draw `count` pictures with their captions; the name decides the seed."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        scenes = [shapes.sample(rng, kinds, textures) for _ in range(count)]
        captions = [scene.caption(rng) for scene in scenes]
        return Drawn(torch.from_numpy(shapes.draw(scenes)), captions, [f"{s.colour} {s.background}" for s in scenes])

    def everything(self) -> Drawn:
        """Draw pictures of every shape and texture: an autoencoder and a CLIP know more than a UNet learned to paint."""
        return self.pictures("everything", ALL_SHAPES, ("", "", shapes.NEW_TEXTURE), self.lengths.pictures)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, trained or taken from a finished stage."""
        path = self.work / "vae.safetensors"
        if not path.exists():
            model = training.train_autoencoder(self.everything().pictures, steps=self.lengths.vae, seed=self.seed + 1)
            save_file(model.state_dict(), path, metadata={"scaling_factor": str(model.config.scaling_factor)})
        model = new_autoencoder()
        model.load_state_dict(_rounded(path))
        model.register_to_config(scaling_factor=float(_metadata(path)["scaling_factor"]))
        return model.eval()

    @cached_property
    def decoder(self) -> AutoencoderKL:
        """The autoencoder with its decoder trained for longer, which is what gets published."""
        path = self.work / "decoder.safetensors"
        model = self.vae
        if not path.exists():
            drawn = self.everything()
            training.train_decoder(model, drawn.pictures, steps=self.lengths.decoder, seed=self.seed + 3)
            save_file(model.state_dict(), path)
        model.load_state_dict(_rounded(path))
        return model.eval()

    @cached_property
    def clip(self) -> CLIPModel:
        """The contrastive pair, trained or taken from a finished stage."""
        path = self.work / "clip.safetensors"
        if not path.exists():
            drawn = self.everything()
            torch.manual_seed(self.seed + 2)
            model = new_clip(self.tokenizer)
            ids = training.tokens(self.tokenizer, drawn.captions, length=32)
            training.train_clip(model, drawn.pictures, ids, drawn.groups, steps=self.lengths.clip, seed=self.seed + 2)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
        model = new_clip(self.tokenizer)
        model.load_state_dict(_rounded(path))
        return model.eval()

    def latents(self, name: str, kinds: tuple[str, ...], textures: tuple[str, ...], count: int) -> training.Latents:
        """Draw and encode pictures, and their captions."""
        drawn = self.pictures(name, kinds, textures, count)
        found = training.contexts(self.clip.text_model, self.tokenizer, ["", *drawn.captions])
        return training.Latents(training.encode(self.vae, drawn.pictures), found[1:], found[0])

    def unet(self, name: str) -> dict[str, Tensor]:
        """Return the weights of the base UNet or of one of its fine-tunes, trained or taken from a finished stage."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            known = self.latents("base", shapes.BASE_SHAPES, ("",), self.lengths.known)
            if name == "base":
                settings: dict[str, Any] = {"parts": [(known, 16)], "steps": self.lengths.base, "rate": 1.2e-3}
            else:
                concept = {
                    "shape": ((shapes.NEW_SHAPE,), ("",)),
                    "texture": (shapes.BASE_SHAPES, (shapes.NEW_TEXTURE,)),
                }[name]
                learned = self.latents(name, *concept, self.lengths.concept)
                settings = {"parts": [(learned, 8), (known, 8)], "steps": self.lengths.tune, "rate": 1e-4}
                settings["start"] = self.unet("base")
            model = training.train_unet(**settings, seed=self.seed + 10 + len(name), label=name)
            save_file(model.state_dict(), path)
        return _rounded(path)

    def publish(self) -> None:
        """Write the three checkpoints, the image tower and the configurations."""
        config = self.out / "config"
        text = self.clip.text_model
        for name, title in TITLES.items():
            tensors = single_file(self.unet(name), self.decoder.state_dict(), text.state_dict())
            metadata = {
                "format": "pt",
                "modelspec.sai_model_spec": "1.0.0",
                "modelspec.architecture": "stable-diffusion-v1",
                "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
                "modelspec.title": title,
                "modelspec.license": "Apache-2.0",
                "modelspec.resolution": "64x64",
                "modelspec.prediction_type": "epsilon",
                "sdmerge.seed": str(self.seed),
            }
            save_file(tensors, self.out / f"tiny-{name}.safetensors", metadata=metadata)
        tower = {name: value for name, value in self.clip.state_dict().items() if not name.startswith("text_model.")}
        save_file(
            {name: value.half().contiguous() for name, value in tower.items() if value.is_floating_point()},
            self.out / "image_tower.safetensors",
            metadata={"format": "pt", "modelspec.title": "Tiny shapes, image tower", "modelspec.license": "Apache-2.0"},
        )
        self.decoder.save_config(config / "vae")
        new_unet().save_config(config / "unet")
        save_scheduler(config / "scheduler")
        text.config.architectures = ["CLIPTextModel"]
        text.config.save_pretrained(config / "text_encoder")
        self.clip.config.save_pretrained(config / "clip")
        write_index(config)


def save_scheduler(folder: Path) -> None:
    """Write SD1's sampling settings."""
    from diffusers import DDIMScheduler
    from models import noise_schedule

    DDIMScheduler.from_config(noise_schedule().config, set_alpha_to_one=False).save_config(folder)


def write_index(folder: Path) -> None:
    """Write the index by which diffusers finds the parts."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _rounded(path: Path) -> dict[str, Tensor]:
    """Load weights as the published files will hold them: later stages build on exactly those."""
    return {
        name: value.half().float() if value.is_floating_point() else value for name, value in load_file(path).items()
    }


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the published files")
    parser.add_argument("--work", type=Path, help="folder of finished stages (default: OUT/work, removed at the end)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--stages", nargs="*", choices=STAGES, help="train only these, and publish nothing")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all lengths, to try things out")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    work = chosen.work or chosen.out / "work"
    shop = Workshop(chosen.out, work, Lengths().scaled(chosen.scale), chosen.seed)
    for stage in chosen.stages or STAGES:
        if stage in {"vae", "decoder", "clip"}:
            getattr(shop, stage)
        else:
            shop.unet(stage)
    if not chosen.stages:
        shop.publish()
        if chosen.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
