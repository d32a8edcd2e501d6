"""The three trainings behind the tiny models, each seeded, on one CPU thread."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from models import new_autoencoder, new_unet, noise_schedule
from torch.nn import functional as F  # noqa: N812 - the name everyone gives it
from vocabulary import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    Part = tuple["Latents", int]
    Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Latents:
    """What a UNet trains on: latents [n, 4, 8, 8], a context for each [n, 77, 48] and the empty prompt's [77, 48]."""

    latents: Tensor
    contexts: Tensor
    empty: Tensor


class Average:
    """An exponential moving average of a model's weights; early on it forgets faster, so that it has no bad start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model's weights after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    self.weights[name].lerp_(value, 1 - decay)


def train(model: nn.Module, loss: Loss, *, steps: int, rate: float, label: str, decay: float = 0.998) -> None:
    """Run AdamW under a warmed-up cosine and leave the averaged weights in the model."""
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
    average = Average(model, decay)
    model.train()
    began, shown = time.perf_counter(), 0.0
    for step in range(steps):
        share = min(1.0, (step + 1) / (0.03 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * (0.02 + 0.98 * share)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update(model, step)
        shown += float(value.detach())
        if (step + 1) % 100 == 0:
            print(
                f"{label} {step + 1}/{steps}: loss {shown / 100:.4f}, {time.perf_counter() - began:.0f} s", flush=True
            )
            shown = 0.0
    model.load_state_dict(average.weights)
    model.eval()


def to_signed(pictures: Tensor) -> Tensor:
    """Turn RGB bytes [n, 64, 64, 3] into floats [n, 3, 64, 64] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(pictures: Tensor, *, steps: int, seed: int) -> AutoencoderKL:
    """Train an autoencoder on RGB bytes [n, 64, 64, 3] and scale its latents to unit deviation."""
    torch.manual_seed(seed)
    model = new_autoencoder()
    train(model, _reconstruction(model, pictures, seed), steps=steps, rate=6e-4, label="autoencoder", decay=0.995)
    model.register_to_config(scaling_factor=round(1 / float(encode(model, pictures[:512], scaled=False).std()), 5))
    return model


def train_decoder(model: AutoencoderKL, pictures: Tensor, *, steps: int, seed: int) -> None:
    """Go on with the decoder alone: pictures get sharper, latents stay what they are."""
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
    train(model, _reconstruction(model, pictures, seed), steps=steps, rate=4e-4, label="decoder", decay=0.995)


def _reconstruction(model: AutoencoderKL, pictures: Tensor, seed: int, batch: int = 8) -> Loss:
    """Return the autoencoder's loss.

    L1 and L2, and what these leave late or never: L1 of neighbouring pixels' differences (sharp edges), of colour
    against grey, and L2 of each latent's patch as a whole (hues; without it green and pink all come out as grey). And
    a little Kullback-Leibler.
    """
    noise = torch.Generator().manual_seed(seed)

    def loss(_step: int) -> Tensor:
        target = to_signed(pictures[torch.randint(len(pictures), (batch,), generator=noise)])
        spread = model.encode(target).latent_dist
        output = model.decode(spread.sample(noise)).sample
        wrong = output - target
        edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
        kl = 0.5 * (spread.mean**2 + spread.var - 1 - spread.logvar).mean()
        tint = (wrong - wrong.mean(dim=1, keepdim=True)).abs().mean() + 5 * (F.avg_pool2d(wrong, 8) ** 2).mean()
        return wrong.abs().mean() + 2 * (wrong**2).mean() + 0.5 * edges + tint + 3e-4 * kl

    return loss


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: Tensor, *, scaled: bool = True) -> Tensor:
    """Encode RGB bytes [n, 64, 64, 3] to latents [n, 4, 8, 8], without the posterior's noise."""
    parts = [model.encode(to_signed(part)).latent_dist.mean for part in pictures.split(64)]
    return torch.cat(parts) * (model.config.scaling_factor if scaled else 1.0)


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str], length: int = MAX_TOKENS) -> Tensor:
    """Tokenize to ids [n, length], padded with the end token as SD1 does."""
    found = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids


def train_clip(
    model: CLIPModel, pictures: Tensor, ids: Tensor, groups: Sequence[str], *, steps: int, seed: int
) -> None:
    """Train both towers contrastively on RGB bytes [n, 64, 64, 3] and the tokens [n, length] of their captions.

    Every other batch is drawn at random; the batches between are 64 pictures each of two of the `groups` (a name for
    each picture): where colours are the same, the towers must look at shape, size and place.
    """
    noise = torch.Generator().manual_seed(seed)
    everyone = torch.arange(len(pictures))
    alike = [everyone[torch.tensor([g == name for g in groups])] for name in sorted(set(groups))]

    def loss(step: int) -> Tensor:
        pools = alike if step % 2 else [everyone]
        halves = [pools[int(which)] for which in torch.randint(len(pools), (2,), generator=noise)]
        chosen = torch.cat([pool[torch.randint(len(pool), (64,), generator=noise)] for pool in halves])
        # attention is causal and the pooled token is the first end token, so padding beyond it changes nothing
        mask = torch.ones_like(ids[chosen])
        found = model(input_ids=ids[chosen], attention_mask=mask, pixel_values=to_signed(pictures[chosen]))
        right = torch.arange(len(chosen))
        return (F.cross_entropy(found.logits_per_text, right) + F.cross_entropy(found.logits_per_image, right)) / 2

    train(model, loss, steps=steps, rate=1.5e-3, label="clip", decay=0.995)


@torch.no_grad()
def contexts(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return what the UNet is conditioned on, [n, 77, 48] float16 (float16 halves what training holds in memory)."""
    parts = [encoder(input_ids=ids).last_hidden_state.half() for ids in tokens(tokenizer, captions).split(64)]
    return torch.cat(parts)


def train_unet(
    parts: Sequence[Part], *, steps: int, rate: float, seed: int, label: str, start: dict[str, Tensor] | None = None
) -> UNet2DConditionModel:
    """Train a UNet to predict the noise, from scratch or from `start`.

    Each step takes from every part its given number of pictures; one prompt in ten is left empty, which is what
    classifier-free guidance compares with.
    """
    torch.manual_seed(seed)
    model = new_unet()
    if start is not None:
        model.load_state_dict(start)
    noise = torch.Generator().manual_seed(seed)
    schedule = noise_schedule()

    def loss(_step: int) -> Tensor:
        latents, context = [], []
        for data, count in parts:
            chosen = torch.randint(len(data.latents), (count,), generator=noise)
            latents.append(data.latents[chosen])
            texts = data.contexts[chosen].float()
            texts[torch.rand(count, generator=noise) < 0.1] = data.empty.float()
            context.append(texts)
        clean = torch.cat(latents)
        added = torch.randn(clean.shape, generator=noise)
        when = torch.randint(1000, (len(clean),), generator=noise)
        return F.mse_loss(model(schedule.add_noise(clean, added, when), when, torch.cat(context)).sample, added)

    train(model, loss, steps=steps, rate=rate, label=label)
    return model
