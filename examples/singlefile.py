"""Write the tiny models as single files, under the names that Stable Diffusion 1 checkpoints have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdformats.layouts import KEY_MAPS
from sdformats.tensor import DType, Spec
from sdmerge.lora.held import Held
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_TEXT = "cond_stage_model.transformer.text_model.embeddings."


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
    """Join the three parts, as diffusers has them, into one SD1 checkpoint: weights in float16, position numbers in int64."""
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    named = {
        f"{part}.{name}": Held(tensor, Spec(tuple(tensor.shape), DType.F32))
        for part, state in parts.items()
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
    tensors = {name: value(ref).half().contiguous() for name, ref in KEY_MAPS["sd1"].to_single(named).tensors.items()}
    count = len(tensors[f"{_TEXT}position_embedding.weight"])
    return tensors | {f"{_TEXT}position_ids": torch.arange(count).unsqueeze(0)} | schedule_tensors()
