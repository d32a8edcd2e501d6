"""Image variation: a model fine-tuned to be told an image's CLIP embedding in place of a text, as CLIP inversion needs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.finetune import Finetune
from sdmerge.train.method import LoopMethod, Trained

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdmerge.execute import Report
    from sdmerge.train.batches import Batch
    from sdmerge.train.clip import ImageEncoder
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Condition, Networks
    from sdmerge.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ImageVariation(LoopMethod):
    """The UNet's weights, so that it is told pictures: one token, a picture's projected embedding; zeros for nothing."""

    name: ClassVar[str] = "image-variation"
    title: ClassVar[str] = "Image variation: a model that is told images, for CLIP inversion."
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-5}
    captions: ClassVar[bool] = False

    clip: Annotated[str | None, Param("the image encoder; else the model's own")] = None
    untold: Annotated[float, Param("tell nothing with this probability, for classifier-free guidance", 0, 1)] = 0.1
    modules: Annotated[str | None, Param("a pattern of tensor names to train, as unet\\..*attn2.*; else all")] = None

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from sdmerge.train.clip import load_image_encoder

        encoder = load_image_encoder(self.clip, settings.model)
        check_width(encoder.width, networks)
        found = Finetune(modules=self.modules).attach(networks, settings)
        return replace(found, told=Features(encoder, self.untold))

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdmerge.train.saving import save_model, texts_of

        return [save_model(trained.parameters, settings, texts_of(self, settings, saving), saving)]


class Features:
    """What a UNet is told about pictures: their embeddings, each computed once.

    Args:
        untold: the share of pictures about which nothing is told.
    """

    def __init__(self, encoder: ImageEncoder, untold: float) -> None:
        self._encoder, self._untold = encoder, untold
        self._kept: dict[Path, Tensor] = {}

    def __call__(self, batch: Batch) -> Condition:
        """Return the condition of a batch, [n, 1, width]."""
        import torch

        from sdmerge.train.networks import Condition

        for path in batch.pictures:
            if path not in self._kept:
                self._kept[path] = self._encoder.features_of([path])
        context = torch.stack([self._kept[path] for path in batch.pictures]).to(batch.latents.device)
        return Condition(context * (torch.rand(len(context), 1, 1) >= self._untold).to(context))


def check_width(width: int, networks: Networks) -> None:
    """Refuse image embeddings that the UNet's cross-attention does not read.

    Raises:
        RequestError: so it is.
    """
    wanted = int(networks.unet.config.cross_attention_dim)
    if width != wanted:
        raise RequestError(
            f"image embeddings are {width} wide, and the model is conditioned on {wanted} (expected the image encoder of the "
            "CLIP model that the text encoder comes from; for SD1 that is ViT-L/14)"
        )


METHOD = ImageVariation
