"""What an extracted LoRA keeps of a tiny fine-tune: the gain in denoising loss on the new concept. See README.md."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import mse_loss

import sdmerge

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "tiny"
sys.path.append(str(EXAMPLES))  # its scripts import each other as they stand
shapes, training = import_module("shapes"), import_module("training")
_PICTURES, _DRAWS = 96, 6


@click.command()
@click.option("--rank", default=8, show_default=True)
@click.option(
    "--to", "layout", default="lycoris", show_default=True, help="lycoris holds norms and biases; kohya does not."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(rank: int, layout: str, json_path: Path | None) -> None:
    """Extract, bake, measure, print."""
    warnings.simplefilter("ignore")
    base, shape, texture = (TINY / f"tiny-{name}.safetensors" for name in ("base", "shape", "texture"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora = folder / "lora.safetensors"
        sdmerge.extract_lora(shape, base, lora, rank=rank, to=layout)
        baked, moved = folder / "baked.safetensors", folder / "moved.safetensors"
        sdmerge.bake(base, [lora], output=baked)
        sdmerge.bake(texture, [lora], output=moved)
        stars = {file.stem: _loss(file, shapes.NEW_SHAPE, "") for file in (base, shape, baked)}
        both = {file.stem: _loss(file, shapes.NEW_SHAPE, shapes.NEW_TEXTURE) for file in (base, texture, moved)}
        size = lora.stat().st_size
    gain = stars["tiny-base"] - stars["tiny-shape"]
    found: dict[str, Any] = {
        "rank": rank,
        "layout": layout,
        "bytes": size,
        "loss on stars": stars,
        "gain kept": (stars["tiny-base"] - stars["baked"]) / gain,
        "loss on striped stars": both,
        "gain of the texture model": both["tiny-base"] - both["tiny-texture"],
        "further gain by the baked shape": both["tiny-texture"] - both["moved"],
    }
    Console().print(found)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _loss(file: Path, shape: str, texture: str) -> float:
    """Return the mean denoising loss on pictures that were never trained on, with the same noise for every model."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(TINY / "config"), local_files_only=True, torch_dtype=torch.float32
    )
    rng = np.random.default_rng(90_210)
    scenes = [shapes.sample(rng, (shape,), (texture,)) for _ in range(_PICTURES)]
    latents = training.encode(pipe.vae, torch.from_numpy(shapes.draw(scenes)))
    context = training.contexts(pipe.text_encoder, pipe.tokenizer, [scene.caption() for scene in scenes]).float()
    noise = torch.Generator().manual_seed(7)
    total = 0.0
    for _ in range(_DRAWS):
        added = torch.randn(latents.shape, generator=noise)
        when = torch.randint(1000, (len(latents),), generator=noise)
        seen = pipe.scheduler.add_noise(latents, added, when)
        total += float(mse_loss(pipe.unet(seen, when, context).sample, added))
    return total / _DRAWS


if __name__ == "__main__":
    main()
