"""The networks of a model, as diffusers and transformers build them, loaded without ever running what a file says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module

    from sdmerge.train.text import TextEncoder

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Types that networks compute in, by the names that users give them."""


@dataclass(frozen=True)
class Condition:
    """What the UNet is conditioned on.

    Attributes:
        context: what cross-attention reads, [n, tokens, width].
        pooled: SDXL's vector for the whole text, [n, width].
    """

    context: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """Return it on a device."""
        return Condition(self.context.to(device), None if self.pooled is None else self.pooled.to(device))

    def detached(self) -> Condition:
        """Return it cut from what it was computed from."""
        return Condition(self.context.detach(), None if self.pooled is None else self.pooled.detach())

    @staticmethod
    def stacked(parts: Sequence[Condition]) -> Condition:
        """Return several, one below the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Condition(torch.cat([part.context for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass
class Networks:
    """A model, ready to be trained or to paint.

    Attributes:
        family: sd1, sd2 or sdxl.
        unet, vae, texts: the networks; text encoders in the order in which their outputs are joined.
        scheduler: the scheduler's configuration.
        clip_skip: which layer of the text encoder counts, from the end; 1 is the last.
    """

    family: str
    unet: Any
    vae: Any
    texts: tuple[TextEncoder, ...]
    scheduler: Mapping[str, Any]
    clip_skip: int = 1

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        found: torch.device = next(self.unet.parameters()).device
        return found

    @property
    def factor(self) -> int:
        """How many pixels are a side of a latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side of the pictures that the model was made for, in pixels."""
        return int(self.unet.config.sample_size) * self.factor

    @property
    def modules(self) -> Mapping[str, Module]:
        """The networks that adapters change, by their names there: ``unet``, ``te1``, ``te2``."""
        return {"unet": self.unet} | {f"te{i}": text.model for i, text in enumerate(self.texts, 1)}

    def freeze(self) -> None:
        """Train nothing, until a method says what."""
        for module in (*self.modules.values(), self.vae):
            module.requires_grad_(False)
            module.eval()

    def train(self, *, checkpointing: bool) -> None:
        """Get ready for training steps; `checkpointing` computes activations again in the backward pass."""
        self.unet.train()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            for text in self.texts:
                enable = getattr(text.model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
                (enable or text.model.gradient_checkpointing_enable)()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the networks; those that nothing is trained of are kept in `dtype`, and the autoencoder in float32.

        SDXL's autoencoder overflows in float16.
        """
        for module in self.modules.values():
            trained = any(parameter.requires_grad for parameter in module.parameters())
            module.to(device, dtype=torch.float32 if trained else dtype)
        self.vae.to(device, dtype=torch.float32)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of pictures.

        Args:
            pixels: [n, 3, height, width] in -1..1.

        Returns:
            Two of [n, 4, height / 8, width / 8], scaled as the UNet sees them.
        """
        spread = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        factor, shift = self._scale
        return (spread.mean - shift) * factor, spread.std * factor

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents as the UNet sees them: [n, 3, height, width], about -1..1; differentiable."""
        factor, shift = self._scale
        found: Tensor = self.vae.decode((latents / factor + shift).to(self.vae.device, self.vae.dtype)).sample
        return found

    @property
    def _scale(self) -> tuple[float, float]:
        """What latents are multiplied with for the UNet, and what is taken from them before."""
        config = self.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    def read(self, texts: Sequence[str]) -> Condition:
        """Return what the UNet is told by texts.

        SD1 and SD2 take the last layer (or an earlier one, normalised, by `clip_skip`); SDXL the last but one of both
        encoders, side by side and not normalised, and the second encoder's projected vector.
        """
        contexts, pooled = [], None
        for text in self.texts:
            found = text(texts)
            if self.family == "sdxl":
                contexts.append(found.hidden_states[-1 - max(self.clip_skip, 1)])
                pooled = getattr(found, "text_embeds", pooled)
            elif self.clip_skip == 1:
                contexts.append(found.last_hidden_state)
            else:
                contexts.append(text.final_norm(found.hidden_states[-self.clip_skip]))
        return Condition(torch.cat(contexts, -1), pooled)

    def predict(self, noisy: Tensor, when: Tensor, condition: Condition, sizes: Tensor | None = None) -> Tensor:
        """Return what the UNet predicts, [n, 4, height, width].

        Args:
            noisy: latents, [n, 4, height, width].
            when: steps, [n].
            condition: of n texts.
            sizes: for SDXL, [n, 6]: height and width of the original, top and left of the cut, height and width wanted.
        """
        added = {}
        if self.family == "sdxl":
            added = {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": sizes}}
        found: Tensor = self.unet(noisy, when, encoder_hidden_states=condition.context, **added).sample
        return found
