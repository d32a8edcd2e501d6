"""Null-text inversion: what guided sampling needs to paint a given picture again, so that it can be edited by its prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import TrainingMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdmerge.execute import Report
    from sdmerge.train.ddim import Ladder
    from sdmerge.train.log import Tell
    from sdmerge.train.networks import Condition, Networks
    from sdmerge.train.settings import Settings

VARIANTS = ("null-text", "negative-prompt", "ddim")


@dataclass(frozen=True, kw_only=True)
class NullText(TrainingMethod):
    """A picture's way back to noise, and unconditional embeddings that keep guided sampling on it, for every step."""

    name: ClassVar[str] = "null-text"
    title: ClassVar[str] = "Null-text inversion: a picture, to be edited by its prompt."
    defaults: ClassVar[dict[str, Any]] = {"data": ""}
    takes: ClassVar[tuple[str, ...]] = (
        "model", "tokenizer", "model_config", "clip_skip", "prediction", "family", "resolution", "output", "dtype", "overwrite",
    )  # fmt: skip

    image: Annotated[str, Param("the picture")]
    prompt: Annotated[str, Param("what is on it")]
    variant: Annotated[
        str,
        Param(
            "negative-prompt takes the prompt for every embedding: at once, and less exact; ddim the empty one, to compare with",
            choices=VARIANTS,
        ),
    ] = "null-text"
    steps: Annotated[int, Param("steps of sampling", 1, 1000)] = 50
    guidance: Annotated[float, Param("scale of classifier-free guidance that it is made for", 1)] = 7.5
    inner: Annotated[int, Param("steps of the optimizer for each step of sampling, at most", 1, 1000)] = 10
    tolerance: Annotated[float, Param("the squared distance from the way at which these stop", 0)] = 1e-5

    def run(self, settings: Settings, tell: Tell) -> list[Report]:
        import torch

        from sdformats.null_text import NullText as Record
        from sdformats.null_text import write_named
        from sdmerge.train.ddim import ladder
        from sdmerge.train.inversion import inverted
        from sdmerge.train.loading import load
        from sdmerge.train.losses import schedule_of
        from sdmerge.train.saving import dtype_of, held, plainly, save_small, texts_of

        saving = plainly(settings)
        networks = load(settings.model)
        if networks.family == "sdxl":
            raise RequestError("null-text inversion is for SD1 and SD2: SDXL is also told a vector for the whole text")
        latents = self._latents(networks, settings.data.resolution, tell)
        schedule = schedule_of(networks.scheduler, settings.loss, settings.model.prediction)
        levels = ladder(schedule, networks.scheduler, self.steps)
        with torch.no_grad():
            told, empty = networks.read([self.prompt]), networks.read([""])
        way = inverted(networks, levels, latents, told)
        nulls = self._nulls(networks, levels, way, told, empty, tell)
        texts = texts_of(self, settings, saving) | {
            "prompt": self.prompt,
            "guidance": str(self.guidance),
            "steps": str(levels.steps),
            "scheduler": json.dumps({"_class_name": "DDIMScheduler", **networks.scheduler}),
        }
        embeddings = held(torch.stack([null.context for null in nulls]), dtype_of(settings))
        record = Record(embeddings, held(way[-1], dtype_of(settings)), texts)
        return [save_small(write_named(record), networks.family, saving)]

    def _nulls(
        self,
        networks: Networks,
        levels: Ladder,
        way: Sequence[Tensor],
        told: Condition,
        empty: Condition,
        tell: Tell,
    ) -> list[Condition]:
        """Return what takes the place of the empty prompt in each step, the noisiest first."""
        from sdmerge.train.inversion import optimised

        if self.variant != "null-text":
            return [empty if self.variant == "ddim" else told] * levels.steps
        with tell.progress("inverting", levels.steps) as advance:
            return optimised(
                networks,
                levels,
                way,
                told,
                empty,
                guidance=self.guidance,
                inner=self.inner,
                tolerance=self.tolerance,
                advance=lambda loss: advance(1, f"distance {loss:.1e}"),
            )

    def _latents(self, networks: Networks, resolution: int, tell: Tell) -> Tensor:
        """Return the latents of the picture, [1, 4, side / 8, side / 8]."""
        from pathlib import Path

        from sdmerge.train import data

        side = resolution or networks.resolution
        try:
            picture = data.opened(Path(self.image))
        except data.UnreadablePicture as error:
            raise data.DataProblems([f"{self.image}: {error}"]) from error
        if min(picture.size) < side:
            wide, high = picture.size
            tell.warn(
                f"{self.image}: is {wide}x{high}, smaller than the model paints ({side}x{side}), and was enlarged"
            )
        return networks.encode(data.pixels(picture, (side, side))[0][None])[0]


METHOD = NullText
