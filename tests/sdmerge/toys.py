"""Models of SD1's structure, a few kilobytes each, for the tests of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TE = "cond_stage_model.transformer.text_model."
CONV_IN = UNET + "input_blocks.0.0.weight"
TO_K = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
POSITION_IDS = TE + "embeddings.position_ids"
_ATTENTION = {1, 2, 4, 5, 7, 8}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the floating tensors: the skeleton of an SD1 checkpoint at width 8, context 6."""
    found: dict[str, tuple[int, ...]] = {CONV_IN: (8, 4, 3, 3), UNET + "input_blocks.0.0.bias": (8,)}
    found |= {UNET + "time_embed.0.weight": (32, 8), UNET + "time_embed.2.weight": (32, 32)}
    for side, count in (("input", 12), ("output", 12)):
        for i in range(1 if side == "input" else 0, count):
            mirrored = i if side == "input" else 11 - i
            block = f"{UNET}{side}_blocks.{i}."
            if side == "input" and i in (3, 6, 9):
                found[block + "0.op.weight"] = (8, 8, 3, 3)
                continue
            found[block + "0.in_layers.2.weight"] = (8, 8 if side == "input" else 16, 3, 3)
            if mirrored in _ATTENTION:
                found |= _attention(block + "1.")
    found |= _attention(UNET + "middle_block.1.")
    found |= {
        UNET + "middle_block.0.in_layers.2.weight": (8, 8, 3, 3),
        UNET + "middle_block.2.in_layers.2.weight": (8, 8, 3, 3),
    }
    found |= {UNET + "out.0.weight": (8,), UNET + "out.2.weight": (4, 8, 3, 3)}
    found |= {
        VAE + "encoder.conv_in.weight": (8, 3, 3, 3),
        VAE + "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
        VAE + "encoder.mid.attn_1.q.weight": (8, 8, 1, 1),
        VAE + "decoder.conv_in.weight": (8, 4, 3, 3),
        VAE + "decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3),
        VAE + "decoder.mid.attn_1.q.weight": (8, 8, 1, 1),
        VAE + "quant_conv.weight": (8, 8, 1, 1),
        VAE + "post_quant_conv.weight": (4, 4, 1, 1),
    }
    found |= {TE + "embeddings.token_embedding.weight": (11, 6), TE + "embeddings.position_embedding.weight": (7, 6)}
    found |= {TE + "encoder.layers.0.self_attn.q_proj.weight": (6, 6), TE + "encoder.layers.0.mlp.fc1.weight": (24, 6)}
    return found | {TE + "final_layer_norm.weight": (6,)}


def _attention(prefix: str) -> dict[str, tuple[int, ...]]:
    inner = prefix + "transformer_blocks.0."
    return {
        prefix + "proj_in.weight": (8, 8, 1, 1),
        prefix + "proj_out.weight": (8, 8, 1, 1),
        inner + "attn1.to_q.weight": (8, 8),
        inner + "attn1.to_k.weight": (8, 8),
        inner + "attn2.to_q.weight": (8, 8),
        inner + "attn2.to_k.weight": (8, 6),
        inner + "attn2.to_v.weight": (8, 6),
    }


def toy(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Return a model's tensors, the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=source) * 0.1).to(dtype) for name, shape in shapes().items()}
    tensors[POSITION_IDS] = torch.arange(7).unsqueeze(0)
    return tensors


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors as a safetensors file, by the reference library."""
    save_file(tensors, str(path), metadata=metadata or {})
    return path


def saved(folder: Path, name: str, seed: int, dtype: torch.dtype = torch.float16) -> Path:
    """Write a toy model."""
    return save(folder / f"{name}.safetensors", toy(seed, dtype))
