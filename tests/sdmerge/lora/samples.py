"""Small adapters of every algorithm for one SD1 UNet, saved, and their changes in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from sdformats.adapters import open_adapter
from sdformats.adapters.records import Full, Norm
from sdformats.files import open_source
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdformats.views import Ref

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
Q, K = f"{BLOCK}attn1_to_q", f"{BLOCK}attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SIZES = {Q: (40, 48, ()), K: (40, 768, ()), CONV: (40, 36, (3, 3)), TE: (64, 48, ())}
"""Rows, inputs and kernel of each module."""


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(shape, generator=generator).mul(0.3).to(dtype)


def lora(modules: tuple[str, ...] = tuple(SIZES), *, rank: int = 8, alpha: float | None = 4, seed: int = 0,
         dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:  # fmt: skip
    found = {}
    for i, module in enumerate(modules):
        rows, inner, kernel = SIZES[module]
        found[f"{module}.lora_up.weight"] = noise(rows, rank, *(1 for _ in kernel), seed=seed + i, dtype=dtype)
        found[f"{module}.lora_down.weight"] = noise(rank, inner, *kernel, seed=seed + i + 50, dtype=dtype)
        if alpha is not None:
            found[f"{module}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return found


def loha(modules: tuple[str, ...] = tuple(SIZES), *, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    found = {}
    for i, module in enumerate(modules):
        rows, inner, kernel = SIZES[module]
        columns = inner * (9 if kernel else 1)
        for n, name in enumerate(("w1", "w2")):
            found[f"{module}.hada_{name}_a"] = noise(rows, rank, seed=seed + i + 7 * n, dtype=torch.float32)
            found[f"{module}.hada_{name}_b"] = noise(rank, columns, seed=seed + i + 9 * n, dtype=torch.float32)
        found[f"{module}.alpha"] = torch.tensor(1.0)
    return found


def lokr(modules: tuple[str, ...] = tuple(SIZES), *, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    found = {}
    for i, module in enumerate(modules):
        rows, inner, kernel = SIZES[module]
        found[f"{module}.lokr_w1"] = noise(4, 4, seed=seed + i, dtype=torch.float32)
        found[f"{module}.lokr_w2_a"] = noise(rows // 4, rank, seed=seed + i, dtype=torch.float32)
        columns = inner // 4 * (9 if kernel else 1)
        found[f"{module}.lokr_w2_b"] = noise(rank, columns, seed=seed + i, dtype=torch.float32)
        found[f"{module}.alpha"] = torch.tensor(3.0)
    return found


def saved(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata)
    return path


def numbers(ref: Ref) -> Tensor:
    return value(ref).double()


def changes(path: Path) -> dict[str, Tensor]:
    """Return each module's change as a matrix."""
    with open_source(path) as source:
        adapter, _ = open_adapter(source)
        return {
            path: (delta(record, numbers).flatten(1) if not isinstance(record, Norm | Full) else _plain(record))
            for path, record in adapter.modules.items()
        }


def _plain(record: Any) -> Tensor:
    found = numbers(record.weight)
    return found.flatten(1) if found.dim() > 1 else found[None]


def ranks(path: Path) -> dict[str, int | None]:
    with open_source(path) as source:
        return {path: record.rank for path, record in open_adapter(source)[0].modules.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
