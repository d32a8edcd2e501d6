"""Make the tiny image-variation model: ``python examples/train_variation.py -o examples/tiny/tiny-image-variation.safetensors``.

The tiny base is tuned to be told the CLIP embedding of a picture in place of a text. All it takes is a model, its CLIP's image
side and pictures without captions; for any SD1 model that is

    sdmerge train image-variation --model MODEL --clip CLIP-FOLDER --data PICTURES -o OUT

Everything is seeded; one CPU core needs about ten minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import shapes
import torch
from PIL import Image

from sdmerge import train

TINY = Path(__file__).parent / "tiny"


def draw(folder: Path, count: int, seed: int) -> None:
    """Write pictures of what the base knows, without captions."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(shapes.render(shapes.sample(rng))).save(folder / f"{number:05d}.png", compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=TINY / "tiny-base.safetensors")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        draw(folder / "pictures", chosen.pictures, chosen.seed)
        made = folder / chosen.output.name
        train.run(
            "image-variation",
            model=str(chosen.model),
            model_config=str(TINY / "config"),
            clip=str(TINY / "image_tower.safetensors"),
            data=str(folder / "pictures"),
            output=str(made),
            steps=chosen.steps,
            batch=16,
            lr=4e-4,
            schedule="cosine",
            warmup=50,
            ema=0.998,
            sample_latents=False,
            buckets=False,
            seed=chosen.seed,
            device="cpu",
        )
        chosen.output.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
