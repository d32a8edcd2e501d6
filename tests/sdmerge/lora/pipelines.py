"""Tiny pipelines of diffusers, adapters for them, and what their weights become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdformats.adapters import open_adapter
from sdformats.files import open_source
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from tests.sdmerge.lora.records import assert_close, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COMPONENTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
VERSIONS = {"sd1": "sd_v1-5", "sdxl": "sdxl_base_v1-0"}
ALPHAS = (1.0, 2.0, 4.0, 3.0)


def unet(family: str) -> Any:
    """Return a UNet with the blocks of its family, and channels for mice."""
    from diffusers import UNet2DConditionModel

    plain, cross = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    kinds = (cross, cross, cross, plain) if family == "sd1" else (plain, cross, cross)
    options: dict[str, Any] = {"attention_head_dim": 4}
    if family == "sdxl":
        options |= {"transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True}
        options |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        options |= {"projection_class_embeddings_input_dim": 40}
    torch.manual_seed(0)
    kind: Any = UNet2DConditionModel
    return kind(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16)[: len(kinds)],
        down_block_types=tuple(kind[0] for kind in kinds),
        up_block_types=tuple(kind[1] for kind in reversed(kinds)),
        cross_attention_dim=12,
        norm_num_groups=4,
        **options,
    )


def text_encoder(*, projects: bool = False) -> Any:
    """Return a CLIP of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(vocab_size=9, projection_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    return CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)


def pipeline(family: str) -> Any:
    """Return a pipeline of these, with nothing else in it."""
    import diffusers

    kind: Any = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    shared = {"vae": None, "tokenizer": None, "scheduler": None, "unet": unet(family), "text_encoder": text_encoder()}
    if family == "sdxl":
        second = text_encoder(projects=True)
        return kind(**shared, text_encoder_2=second, tokenizer_2=None, add_watermarker=False)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**shared, **nothing)


def path_of(component: str, name: str) -> str:
    """Return our path of a module; transformers 5 names those of CLIPTextModel without ``text_model.``."""
    bare = component != "unet" and name.startswith(("encoder.", "embeddings.", "final_layer_norm"))
    return f"{component}.text_model.{name}" if bare else f"{component}.{name}"


def weights_of(network: nn.Module, component: str) -> dict[str, Tensor]:
    """Return the weights of all linear maps and convolutions, by our paths."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in f".{name}":
            found[path_of(component, name.removesuffix(".base_layer"))] = module.weight.detach().clone()
    return found


def all_weights(pipe: Any) -> dict[str, Tensor]:
    """Return those of every network of a pipeline."""
    networks = {component: getattr(pipe, name, None) for component, name in COMPONENTS.items()}
    return {
        path: weight
        for component, network in networks.items()
        if network is not None
        for path, weight in weights_of(network, component).items()
    }


def kohya_name(path: str, family: str) -> str:
    """Return what sd-scripts calls a module."""
    component, _, rest = path.partition(".")
    prefix = {"unet": "unet", "te1": "te" if family == "sd1" else "te1", "te2": "te2"}[component]
    return f"lora_{prefix}_{rest.replace('.', '_')}"


def lora_file(
    target: Path, weights: Mapping[str, Tensor], family: str, *, uniform: bool = False, dora: bool = False
) -> Path:
    """Write LoRA for these weights under sd-scripts' names: of mixed ranks and alphas, or all of one scale."""
    tensors: dict[str, Tensor] = {}
    for number, (path, weight) in enumerate(weights.items()):
        name = kohya_name(path, family)
        rank = 2 if uniform else 1 + number % 3
        out, *inner = weight.shape
        tensors[f"{name}.lora_down.weight"] = numbers(3 * number, rank, *inner)
        tensors[f"{name}.lora_up.weight"] = numbers(3 * number + 1, out, rank, *(1,) * (len(inner) - 1))
        tensors[f"{name}.alpha"] = torch.tensor(2.0 if uniform else ALPHAS[number % 4])
        if dora:
            lengths = numbers(3 * number + 2, out, *(1,) * len(inner)).abs() + 0.5
            tensors[f"{name}.dora_scale"] = lengths
    return saved(target, tensors, family)


def saved(target: Path, tensors: dict[str, Tensor], family: str) -> Path:
    """Write a file that says what it is for."""
    save_file(tensors, str(target), metadata={"ss_base_model_version": VERSIONS[family]})
    return target


def our_changes(source: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what we say that an adapter adds to each weight."""
    with open_source(source) as opened:
        adapter, _ = open_adapter(opened)
        assert adapter.scaled
        return {path: delta(record, value, weights[path]) for path, record in adapter.modules.items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-6) -> None:
    """Compare changes of the same modules."""
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        assert_close(found[path], change, relative)


def assert_same_changes(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], changes: Mapping[str, Tensor], relative: float = 1e-5
) -> None:
    """Compare what another program made of all weights with what we say."""
    assert changes.keys() <= before.keys()
    for path, weight in before.items():
        if path in changes:
            assert_close(after[path] - weight, changes[path], relative)
        else:
            assert torch.equal(after[path], weight), path
