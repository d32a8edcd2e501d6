"""CLIP inversion: an image embedding for what the pictures show, for a model that takes one in place of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Condition, Networks
    from sdmerge.train.settings import Settings

MEAN, ZEROS = "mean", "zeros"
NAME = "clip_image"


def seen(vectors: Tensor, count: int) -> Condition:
    """Return what the UNet is told by an image embedding, [tokens, width], `count` times."""
    from sdmerge.train.networks import Condition

    return Condition(vectors.expand(count, *vectors.shape))


@dataclass(frozen=True, kw_only=True)
class ClipInversion(LoopMethod):
    """One vector in the place of an image's embedding, trained through a frozen model that is conditioned on images."""

    name: ClassVar[str] = "clip-inversion"
    title: ClassVar[str] = "CLIP inversion: an image embedding for an image-variation model."
    defaults: ClassVar[dict[str, Any]] = {"lr": 5e-2, "weight_decay": 0.0}
    captions: ClassVar[bool] = False

    clip: Annotated[str | None, Param("the image encoder; else the model's own")] = None
    init: Annotated[
        str, Param("what the vector begins as: mean (of the pictures' embeddings), zeros, or a file of one")
    ] = MEAN

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from torch.nn import Parameter

        vector = Parameter(self._start(networks, settings))
        return Trained({NAME: vector}, told=lambda batch: seen(vector, len(batch.captions)))

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdformats.clip_inversion import ClipInversion as Record
        from sdformats.clip_inversion import write_named
        from sdmerge.train.saving import dtype_of, held, save_small, texts_of

        vectors = held(trained.parameters[NAME], dtype_of(settings))
        return [save_small(write_named(Record(vectors, texts_of(self, settings, saving))), networks.family, saving)]

    def _start(self, networks: Networks, settings: Settings) -> Tensor:
        """Return what the vector begins as, [1, width]."""
        from pathlib import Path

        import torch

        from sdmerge.train import data
        from sdmerge.train.clip import load_image_encoder
        from sdmerge.train.image_variation import check_width
        from sdmerge.train.style import read_style

        width = int(networks.unet.config.cross_attention_dim)
        if self.init == ZEROS:
            return torch.zeros(1, width)
        if self.init != MEAN:
            found = read_style(Path(self.init))[None]
        else:
            items = data.find(Path(settings.data.data), captions=False)
            encoder = load_image_encoder(self.clip, settings.model)
            found = encoder.features_of([item.path for item in items]).mean(0, keepdim=True)
        check_width(found.shape[1], networks)
        return found


METHOD = ClipInversion
