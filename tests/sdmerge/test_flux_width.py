"""Flux at its full width, which diffusers has written in, with one block of each kind: it loads what is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from sdmerge import api
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_POOL = torch.randn(1 << 16, generator=torch.Generator().manual_seed(5)).bfloat16()


def numbers(shape: torch.Size, seed: int) -> Tensor:
    """Return numbers that are cheap to make, others for each tensor."""
    count = shape.numel()
    return _POOL.roll(seed).repeat(count // len(_POOL) + 1)[:count].reshape(shape)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_diffusers_loads_flux_at_full_width(tmp_path: Path) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True, joint_attention_dim=32, pooled_projection_dim=12
        )
    folder = tiny.save_folder(tmp_path / "a", "flux")
    given = {name: numbers(value.shape, 7 * i) for i, (name, value) in enumerate(network.state_dict().items())}
    save_file(given, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(dict(network.config)))
    assert given["single_transformer_blocks.0.proj_mlp.weight"].shape == (12288, 3072)

    api.convert(folder, tmp_path / "b.safetensors", to="single-file")
    more = {"torch_dtype": torch.bfloat16, "tokenizer": None, "tokenizer_2": None, "local_files_only": True}
    made = FluxPipeline.from_single_file(str(tmp_path / "b.safetensors"), config=str(folder), **more)
    assert same(made.transformer.state_dict(), given)
    expected = tiny.components("flux")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        halves = {key: value.half().bfloat16() for key, value in expected[name].state_dict().items()}
        assert same({key: value.bfloat16() for key, value in getattr(made, name).state_dict().items()}, halves), name
    del made

    (tmp_path / "a" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    api.convert(tmp_path / "b.safetensors", tmp_path / "c", to="diffusers")
    assert same(load_file(tmp_path / "c" / "transformer" / "diffusion_pytorch_model.safetensors"), given)
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "c", subfolder="transformer", torch_dtype=torch.bfloat16)
    assert same(again.state_dict(), given)
