"""diffusers finds in our Flux files, which have fused modules, the modules and changes that we were given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdmerge import convert
from tests.sdmerge.lora.records import assert_close, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="is an independent reader")

H = 3072  # diffusers cuts linear1 at multiples of this, whatever the file has
DOUBLE = {
    **{f"attn.{name}": (H, H) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{name}_proj": (H, H) for name in "qkv"},
    **{f"{name}.net.0.proj": (4 * H, H) for name in ("ff", "ff_context")},
    **{f"{name}.net.2": (H, 4 * H) for name in ("ff", "ff_context")},
    **{f"{name}.linear": (6 * H, H) for name in ("norm1", "norm1_context")},
}
SINGLE = {f"attn.to_{name}": (H, H) for name in "qkv"}
SINGLE |= {"proj_mlp": (4 * H, H), "proj_out": (H, 5 * H), "norm.linear": (3 * H, H)}
MODULES = {f"transformer_blocks.{i}.{name}": shape for i in (0, 11) for name, shape in DOUBLE.items()}
MODULES |= {f"single_transformer_blocks.{i}.{name}": shape for i in (0, 11) for name, shape in SINGLE.items()}
_SHARED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")


def flux_file(target: Path, *, shared: bool) -> Path:
    """Write LoRA under diffusers' names; `shared`: with one down for the parts of a fused module."""
    tensors: dict[str, Tensor] = {}
    for number, (module, (out, inner)) in enumerate(MODULES.items()):
        same = shared and module.endswith(_SHARED)
        rank, seed = (2, 5) if same else (1 + number % 3, number)
        tensors[f"transformer.{module}.lora_A.weight"] = numbers(seed, rank, inner)
        tensors[f"transformer.{module}.lora_B.weight"] = numbers(1000 + number, out, rank)
    save_file(tensors, str(target))
    return target


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what every module's change makes of some inputs, at scale 1."""
    ends = ".lora_A.weight", ".lora_B.weight"
    assert all(name.endswith(ends) for name in tensors)
    modules = sorted({name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)})
    downs, ups = ({module: tensors[module + end] for module in modules} for end in ends)
    return {module: ups[module] @ (down @ numbers(7, down.shape[1], 5)) for module, down in downs.items()}


@pytest.mark.parametrize("shared", [True, False], ids=["one down", "a down each"])
def test_diffusers_reads_fused_modules(tmp_path: Path, shared: bool) -> None:
    file = flux_file(tmp_path / "in.safetensors", shared=shared)
    target = tmp_path / "out.safetensors"
    convert(file, target, to="flux-kohya")
    written = load_file(str(target))
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in written
    found = products(diffusers.FluxPipeline.lora_state_dict(dict(written)))
    expected = products(load_file(str(file)))
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert_close(found[module], change)


@pytest.mark.parametrize("shared", [True, False], ids=["one down", "a down each"])
def test_flux_comes_back_from_fused_modules(tmp_path: Path, shared: bool) -> None:
    file = flux_file(tmp_path / "in.safetensors", shared=shared)
    convert(file, tmp_path / "fused.safetensors", to="flux-kohya")
    convert(tmp_path / "fused.safetensors", tmp_path / "back.safetensors", to="flux-diffusers")
    before, after = (load_file(str(path)) for path in (file, tmp_path / "back.safetensors"))
    assert before.keys() == after.keys()
    found = products(after)
    for name, change in products(before).items():
        assert_close(found[name], change)
    same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert same, "what was not fused is copied"
