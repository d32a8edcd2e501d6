"""Models of every family at toy widths, as a diffusers folder and as a single file, and a LoRA over every module of theirs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdformats.adapters import names
from sdformats.adapters.adapter import Adapter
from sdformats.adapters.records import LoRA
from sdformats.files import open_source
from sdformats.layout import SINGLE_FILE
from sdformats.renamed import spelled
from sdmerge.lora.convert import layout_for
from tests import tiny
from tests.sdmerge.lora.adapters import write
from tests.sdmerge.lora.records import held, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
RANK = 3
COMPONENTS = {
    "unet": "unet",
    "transformer": "unet",
    "text_encoder": "te1",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
}
_FILES = {"unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model"}


@cache
def components(family: str) -> Mapping[str, nn.Module]:
    """Return the networks of a model, by the folders that they are saved in. Not to be changed."""
    if family in ("sd1", "sd2", "sdxl"):
        return {name: module for name, module in tiny.components(family).items() if name != "vae"}
    torch.manual_seed(7)
    found: dict[str, nn.Module] = {
        "transformer": _transformer(family),
        "text_encoder": tiny.clip(12, projected=family == "sd3"),
    }
    if family == "sd3":
        found["text_encoder_2"] = tiny.clip(16, projected=True)
    return found | {"text_encoder_3" if family == "sd3" else "text_encoder_2": _t5()}


def _transformer(family: str) -> nn.Module:
    import diffusers

    shared: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2, "in_channels": 4}
    shared |= {"joint_attention_dim": 12, "pooled_projection_dim": 10}
    if family == "flux":
        kind: Any = diffusers.FluxTransformer2DModel
        return kind(**shared, num_single_layers=2, guidance_embeds=True, axes_dims_rope=(2, 2, 4))
    kind = diffusers.SD3Transformer2DModel
    places = {"sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8}
    return kind(
        **shared, **places, out_channels=4, caption_projection_dim=16, qk_norm="rms_norm", dual_attention_layers=(0,)
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def modules(family: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield every linear map and convolution of a model by our path."""
    for folder, network in components(family).items():
        component = "te3" if folder == "text_encoder_2" and family == "flux" else COMPONENTS[folder]
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{component}.{_with_text_model(folder, name)}", module


def _with_text_model(folder: str, name: str) -> str:
    """Give CLIP's names what transformers 5 leaves out."""
    bare = folder.startswith("text_encoder") and name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm"))
    return f"text_model.{name}" if bare else name


def tensors(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a model's tensors as ``folder.key``."""
    return {
        f"{folder}.{_with_text_model(folder, key)}": tensor.to(dtype)
        for folder, network in components(family).items()
        for key, tensor in network.state_dict().items()
        if key != "encoder.embed_tokens.weight"
    }


def folder(path: Path, given: Mapping[str, Tensor]) -> Path:
    """Write tensors called ``folder.key`` as diffusers does."""
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    inside: dict[str, dict[str, Tensor]] = {}
    for name, tensor in given.items():
        part, _, key = name.partition(".")
        inside.setdefault(part, {})[key] = tensor.contiguous()
    for part, found in inside.items():
        (path / part).mkdir()
        save_file(found, str(path / part / f"{_FILES.get(part, 'model')}.safetensors"))
    return path


def single(path: Path, family: str, given: Mapping[str, Tensor]) -> Path:
    """Write the same tensors as a single file."""
    if family in ("flux", "sd3"):
        save_file(_fused(given, family), str(path))
        return path
    with (
        open_source(folder(path.with_suffix(""), given)) as source,
        spelled(source, SINGLE_FILE, family=family) as named,
    ):
        found = {name: torch.frombuffer(named.read(name), dtype=torch.uint8) for name in named.specs}
        dtype = next(iter(given.values())).dtype
        save_file({name: data.view(dtype).reshape(named.specs[name].shape) for name, data in found.items()}, str(path))
    return path


def _fused(given: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return a transformer's tensors as its makers join and name them, but for norms, and its text encoders'."""
    encoders = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g" if family == "sd3" else "t5xxl",
        "text_encoder_3": "t5xxl",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        part, _, key = name.partition(".")
        if key == "pos_embed.pos_embed":
            found["model.diffusion_model.pos_embed"] = tensor
        if part in encoders:
            found[f"text_encoders.{encoders[part]}.transformer.{key}"] = tensor
    for theirs, rule in (names.flux() if family == "flux" else names.sd3()).items():
        for end in ("weight", "bias"):
            parts = [given[name] for one in rule.parts if (name := f"transformer.{one}.{end}") in given]
            if len(parts) == len(rule.parts) and "norm_" not in rule.parts[0].rpartition(".")[2]:
                joined = torch.cat(parts)
                # Only the last block's context has a norm of two parts, scale and shift.
                swapped = rule.swapped or (
                    rule.swapped_alone and len(joined) == 2 * given["transformer.proj_out.weight"].shape[1]
                )
                found[f"model.diffusion_model.{theirs}.{end}"] = joined.roll(len(joined) // 2, 0) if swapped else joined
    return found


def lora(path: Path, family: str) -> tuple[Path, dict[str, Tensor]]:
    """Write a LoRA over every module, in the family's usual layout; return the changes too, each a fifth of its weight."""
    records, changes = {}, {}
    for i, (module, network) in enumerate(modules(family)):
        weight = network.weight.detach()
        out, inner, *kernel = weight.shape
        ones = (1,) * len(kernel)
        up, down = numbers(2 * i, out, RANK, *ones), numbers(2 * i + 1, RANK, inner, *kernel)
        strength = 0.2 * float(weight.norm() / (up.flatten(1) @ down.flatten(1)).norm())
        records[module] = LoRA(up=held(up * strength), down=held(down), alpha=float(RANK))
        changes[module] = (up * strength).double().flatten(1) @ down.double().flatten(1)
    layout = layout_for(family, None)
    path.mkdir()
    return write(layout, Adapter(records, family=family), path), changes


def read_folder(path: Path) -> dict[str, Tensor]:
    """Read tensors as ``folder.key``."""
    return {
        f"{file.parent.name}.{key}": tensor
        for file in path.rglob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
