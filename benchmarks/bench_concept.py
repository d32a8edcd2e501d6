"""What an extracted LoRA keeps of a tiny fine-tune: the gain in denoising loss on the new concept. See README.md."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import mse_loss

import sdmerge
from benchmarks.report import save

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "tiny"
sys.path.append(str(EXAMPLES))  # its scripts import each other as they stand
shapes, training = import_module("shapes"), import_module("training")
_PICTURES, _DRAWS = 96, 6
_BOTH = (shapes.NEW_SHAPE,), (shapes.NEW_TEXTURE,)
_CONCEPTS = {"shape": ((shapes.NEW_SHAPE,), ("",)), "texture": (shapes.BASE_SHAPES, (shapes.NEW_TEXTURE,))}
"""The shapes and textures of what each fine-tune learned."""


@click.command()
@click.option("--rank", default=8, show_default=True)
@click.option(
    "--to", "layout", default="lycoris", show_default=True, help="lycoris holds norms and biases; kohya does not."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(rank: int, layout: str, json_path: Path | None) -> None:
    """Extract, bake, measure, print."""
    warnings.simplefilter("ignore")
    found = {"rank": rank, "layout": layout} | {name: _measured(name, rank, layout) for name in _CONCEPTS}
    Console().print(found)
    save(found, json_path)


def _measured(name: str, rank: int, layout: str) -> dict[str, Any]:
    """Return what a LoRA of one fine-tune keeps, and what it brings to the other."""
    other = next(one for one in _CONCEPTS if one != name)
    base, tuned, others = (TINY / f"tiny-{one}.safetensors" for one in ("base", name, other))
    with tempfile.TemporaryDirectory() as folder:
        made = {one: Path(folder) / f"{one}.safetensors" for one in ("fixed", "sized", "baked", "moved")}
        errors = {}
        for one, limit in (("fixed", {"rank": rank}), ("sized", {})):
            size = limit or {"size": made["fixed"].stat().st_size}
            report = made[one].with_suffix(".json")
            sdmerge.extract_lora(tuned, base, made[one], **size, to=layout, report=report)
            errors[one] = json.loads(report.read_text(encoding="utf-8"))["error"]
        sdmerge.bake(base, [made["fixed"]], output=made["baked"])
        sdmerge.bake(others, [made["fixed"]], output=made["moved"])
        losses = {file.stem: _loss(file, *_CONCEPTS[name]) for file in (base, tuned, made["baked"])}
        sdmerge.bake(base, [made["sized"]], output=made["baked"], overwrite=True)
        losses["baked by size"] = _loss(made["baked"], *_CONCEPTS[name])
        both = {file.stem: _loss(file, *_BOTH) for file in (base, others, made["moved"])}
        nbytes = made["fixed"].stat().st_size
    gain = losses["tiny-base"] - losses[tuned.stem]
    return {
        "bytes": nbytes,
        "relative error": errors["fixed"],
        "relative error by size, of as many bytes": errors["sized"],
        "loss": losses,
        "gain kept": (losses["tiny-base"] - losses["baked"]) / gain,
        "gain kept by size": (losses["tiny-base"] - losses["baked by size"]) / gain,
        "loss on striped stars": both,
        "gain of the other model": both["tiny-base"] - both[others.stem],
        "further gain by the baked LoRA": both[others.stem] - both["moved"],
    }


@torch.no_grad()
def _loss(file: Path, kinds: Sequence[str], textures: Sequence[str]) -> float:
    """Return the mean denoising loss on pictures that were never trained on, with the same noise for every model."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(TINY / "config"), local_files_only=True, torch_dtype=torch.float32
    )
    rng = np.random.default_rng(90_210)
    scenes = [shapes.sample(rng, kinds, textures) for _ in range(_PICTURES)]
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
