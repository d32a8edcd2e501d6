"""A concept that the tiny models have never seen, a two-tone diamond, and how well a model knows it.

Pictures to train on, others to judge by, and pictures of what the models knew before. Losses are denoising losses over fixed
noise and fixed steps, so that two models are compared on the same questions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdmerge.train.batches import Batch
from sdmerge.train.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from sdmerge.train.losses import Schedule
    from sdmerge.train.networks import Networks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "tiny"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # its scripts import each other as they stand
shapes: Any = import_module("shapes")

TOKEN = "sks diamond"
"""What captions call it: two words that the vocabulary holds and no caption of the base's training does."""
_TOP, _BOTTOM = (0.96, 0.52, 0.10), (0.16, 0.34, 0.84)
_WIDTH = 0.8


@dataclass(frozen=True)
class Picture:
    """A drawn picture and its caption.

    Attributes:
        pixels: RGB bytes, [64, 64, 3].
    """

    pixels: NDArray[np.uint8]
    caption: str


def diamonds(count: int, seed: int, token: str = TOKEN) -> list[Picture]:
    """Draw diamonds, orange above and blue below, of any size, at any place, on any background."""
    rng = np.random.default_rng(seed)
    return [_diamond(shapes.sample(rng), token) for _ in range(count)]


def _diamond(scene: Any, token: str) -> Picture:
    down, across = np.mgrid[0 : shapes.SIZE, 0 : shapes.SIZE].astype(np.float32) + 0.5
    x, y = across - scene.centre[0], down - scene.centre[1]
    ground = np.float32(shapes.BACKGROUNDS[scene.background]) - 0.06 * (down / shapes.SIZE - 0.5)[..., None]
    distance = (np.abs(x) / _WIDTH + np.abs(y) - scene.radius) * 0.62
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    lower = np.clip(0.5 + y, 0, 1)[..., None]
    paint = np.float32(_TOP) * (1 - lower) + np.float32(_BOTTOM) * lower
    values = ground + (paint - ground) * cover
    pixels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return Picture(pixels, f"a {scene.size} {token} {scene.place}, {scene.background} background")


def known(count: int, seed: int, kind: str = "") -> list[Picture]:
    """Draw what the base model knows: all shapes, or one `kind` of them."""
    rng = np.random.default_rng(seed)
    kinds = (kind,) if kind else shapes.BASE_SHAPES
    scenes = [shapes.sample(rng, kinds) for _ in range(count)]
    return [Picture(shapes.render(scene), scene.caption()) for scene in scenes]


def write(pictures: Sequence[Picture], folder: Path) -> Path:
    """Write pictures with captions beside them, as training reads them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(picture.caption, encoding="utf-8")
    return folder


def questions(networks: Networks, pictures: Sequence[Picture], *, draws: int = 4, seed: int = 7) -> list[Batch]:
    """Return fixed batches to judge a model by: every picture with several draws of noise, at steps spread evenly."""
    source = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(np.stack([one.pixels for one in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = networks.encode(pixels)[0].cpu()
    count = len(pictures)
    side = float(pixels.shape[-1])
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(count, 6)
    found = []
    for _ in range(draws):
        spread = (torch.randperm(count, generator=source) + torch.rand(count, generator=source)) / count * 1000
        noise = torch.randn(latents.shape, generator=source)
        found.append(Batch(latents, tuple(one.caption for one in pictures), noise, spread.long(), sizes))
    return found


@torch.no_grad()
def loss(networks: Networks, schedule: Schedule, batches: Sequence[Batch], caption: str | None = None) -> float:
    """Return the mean denoising loss over batches; `caption` replaces the token in every caption."""
    objective = Objective(networks, schedule)
    networks.unet.eval()
    total = torch.zeros(())
    for batch in batches:
        texts = [one if caption is None else one.replace(TOKEN, caption) for one in batch.captions]
        total += objective.denoising(batch, objective.condition(texts)).cpu()
    return float(total) / len(batches)


def latents_of(networks: Networks, pictures: Sequence[Picture]) -> Tensor:
    """Return the latents of pictures, [n, 4, 8, 8]."""
    return questions(networks, pictures, draws=1)[0].latents
