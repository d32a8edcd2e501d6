"""Pictures that a run paints on its way, and the sheet that shows them over the steps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdmerge import pictures
from sdmerge.sampling import Painting, paint
from sdmerge.train.settings import painting_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL.Image import Image

    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

FOLDER, SHEET = "samples", "samples.png"
_NAME = re.compile(r"(\d+)-(\d+)\.png")


def paint_samples(folder: Path, step: int, prompts: Sequence[str], networks: Networks, settings: Settings) -> None:
    """Paint a picture for each prompt, from the same noise at every step, and the sheet of all that were painted so far.

    Args:
        folder: the run's; pictures go into a subfolder, ``STEP-PROMPT.png``.
    """
    inner = folder / FOLDER
    inner.mkdir(exist_ok=True)
    seeds = [settings.run.seed + i for i in range(len(prompts))]
    training = networks.unet.training
    networks.unet.eval()
    try:
        painted = paint(networks, prompts, seeds, Painting(**painting_of(settings)))
    finally:
        networks.unet.train(training)
    for i, image in enumerate(painted):
        pictures.save(image, inner / f"{step:06d}-{i}.png", overwrite=True)
    pictures.save(_sheet(inner, prompts), folder / SHEET, overwrite=True)


def _sheet(folder: Path, prompts: Sequence[str]) -> Image:
    import PIL.Image

    there = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    steps = sorted({int(match[1]) for match in there})
    rows = [
        [PIL.Image.open(folder / f"{step:06d}-{i}.png").convert("RGB") for i in range(len(prompts))] for step in steps
    ]
    return pictures.sheet("", [(f"step {step:,}", "") for step in steps], list(prompts), rows)
