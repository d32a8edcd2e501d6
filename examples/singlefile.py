"""Write the tiny models as single files, under the names that Stable Diffusion 1 checkpoints have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_LEVELS = 4


def _block_name(side: str, level: int, kind: str, index: int) -> str:
    """Name one block of the UNet: SD1 counts blocks through all levels, three to a level."""
    if side == "down":
        return (
            f"input_blocks.{3 * level + 3}.0.op"
            if kind == "downsamplers"
            else (f"input_blocks.{3 * level + index + 1}.{0 if kind == 'resnets' else 1}")
        )
    if kind == "upsamplers":
        # the innermost level has no attention, so its upsampler moves up one place
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}"
    return f"output_blocks.{3 * level + index}.{0 if kind == 'resnets' else 1}"


def unet_name(name: str) -> str:
    """Turn a diffusers UNet name into SD1's."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", name)
    if found:
        side, level, kind, index = found.groups()
        rest = name[found.end() :]
        if kind == "downsamplers":
            rest = rest.removeprefix("conv.")
        head = _block_name(side, int(level), kind, int(index))
    else:
        old = next(key for key in _TOP if name.startswith(f"{key}."))
        head, rest = _TOP[old], name.removeprefix(f"{old}.")
    first, _, last = rest.rpartition(".")
    return f"{UNET}{head}.{_RESNET.get(first, first)}.{last}" if first else f"{UNET}{head}.{last}"


def vae_name(name: str) -> str:
    """Turn a diffusers autoencoder name into SD1's."""
    name = re.sub(
        r"(down|up)_blocks\.(\d+)\.(resnets\.|\w+samplers\.0)",
        lambda found: (
            f"{found[1]}.{found[2] if found[1] == 'down' else _LEVELS - 1 - int(found[2])}."
            + ("block." if found[3] == "resnets." else f"{found[1]}sample")
        ),
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, rest = name.split("mid_block.attentions.0.")
        first, _, last = rest.rpartition(".")
        name = f"{head}mid.attn_1.{_VAE_ATTENTION[first]}.{last}"
    return VAE + name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def text_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a CLIP text encoder's tensors, with or without ``text_model.``, into SD1's, position numbers included."""
    named = {TEXT + name.removeprefix("text_model."): value for name, value in state.items()}
    count = named[f"{TEXT}embeddings.position_embedding.weight"].shape[0]
    named[f"{TEXT}embeddings.position_ids"] = torch.arange(count).unsqueeze(0)
    return named


def schedule_tensors() -> dict[str, Tensor]:
    """Return the buffers of the noise schedule that SD1 checkpoints carry, each [1000] float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    spread = betas * (1 - before) / (1 - kept)
    tensors = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": kept.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": spread,
        "posterior_log_variance_clipped": spread.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }
    return {name: value.float() for name, value in tensors.items()}


def single_file(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the three parts into one SD1 checkpoint: weights in float16, position numbers in int64."""
    tensors = {unet_name(name): value for name, value in unet.items()}
    for name, value in vae.items():
        named = vae_name(name)
        # SD1's autoencoder has 1x1 convolutions where diffusers has linear layers
        square = ".mid.attn_1." in named and value.ndim == 2
        tensors[named] = value[:, :, None, None] if square else value
    tensors |= text_tensors(text)
    tensors = {n: (v.half() if v.is_floating_point() else v).contiguous() for n, v in tensors.items()}
    return tensors | schedule_tensors()
