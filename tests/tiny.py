"""Whole models of every family at toy widths, as diffusers and transformers build them."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

CONTEXT, WIDE = 12, 16
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd3.5": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
_CROSS, _PLAIN = "CrossAttn", ""
_LEVELS = {
    "sd1": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "sd2": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "sdxl": (_PLAIN, _CROSS, _CROSS),
    "sdxl-refiner": (_PLAIN, _CROSS, _CROSS, _PLAIN),
}
_DEPTHS: dict[str, Any] = {"sdxl": [1, 2, 3], "sdxl-refiner": [1, 2, 2, 1]}


def unet(family: str, **config: Any) -> Module:
    """Return a UNet of SD1, SD2, SDXL or its refiner."""
    from diffusers import UNet2DConditionModel

    kinds = _LEVELS[family]
    given: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 24)[: len(kinds)],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": CONTEXT,
    }
    if family != "sd1":
        given["use_linear_projection"] = True
    if family.startswith("sdxl"):
        ids = 6 if family == "sdxl" else 5
        given |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        given |= {
            "transformer_layers_per_block": _DEPTHS[family],
            "projection_class_embeddings_input_dim": WIDE + 4 * ids,
        }
        given["cross_attention_dim"] = CONTEXT + WIDE if family == "sdxl" else WIDE
    return UNet2DConditionModel(**{**given, **config})


def vae(**config: Any) -> Module:
    """Return a VAE of four levels."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (4, 8, 8, 12), "layers_per_block": 2, "norm_num_groups": 2, "sample_size": 32}
    return AutoencoderKL(**{**kinds, **widths, **config})


def clip(width: int, *, layers: int = 3, projected: bool = False) -> Module:
    """Return a text encoder of CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=7,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int) -> Module:
    """Return an encoder of T5."""
    from transformers import T5Config, T5EncoderModel

    heads = {"num_heads": 2, "d_kv": width // 2, "relative_attention_num_buckets": 4}
    return T5EncoderModel(
        T5Config(vocab_size=20, d_model=width, d_ff=24, num_layers=2, feed_forward_proj="gated-gelu", **heads)
    )


def sd3(**config: Any) -> Module:
    """Return a transformer of SD3."""
    from diffusers import SD3Transformer2DModel

    size = {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "pos_embed_max_size": 6,
    }
    text = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": CONTEXT + WIDE}
    return SD3Transformer2DModel(**{**size, **text, "in_channels": 16, **config})


def flux(**config: Any) -> Module:
    """Return a transformer of Flux."""
    from diffusers import FluxTransformer2DModel

    size = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": CONTEXT, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(**{**size, **text, "in_channels": 64, "guidance_embeds": True, **config})


def _transformed(family: str) -> dict[str, Module]:
    wide_vae = vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    if family == "flux":
        return {"transformer": flux(), "vae": wide_vae, "text_encoder": clip(CONTEXT), "text_encoder_2": t5(32)}
    pooled = clip(CONTEXT, projected=True)
    torch.nn.init.eye_(pooled.text_projection.weight)  # SD3 takes the first encoder's result as it is
    dual = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if family == "sd3.5" else {}
    encoders = {"text_encoder": pooled, "text_encoder_2": clip(WIDE, projected=True), "text_encoder_3": t5(32)}
    return {"transformer": sd3(**dual), "vae": wide_vae, **encoders}


@cache
def components(family: str) -> Mapping[str, Module]:
    """Return the parts of a model, by the folders that they are saved in. Not to be changed."""
    torch.manual_seed(7)
    if family.startswith(("sd3", "flux")):
        return _transformed(family)
    found: dict[str, Module] = {"unet": unet(family), "vae": vae()}
    if family in ("sd1", "sd2", "sdxl"):
        found["text_encoder"] = clip(CONTEXT)
    if family.startswith("sdxl"):
        found["text_encoder_2"] = clip(WIDE, projected=True)
    return found


def tensors(family: str) -> dict[str, Tensor]:
    """Return the tensors of a model in half precision, as in a folder: ``component.key``, CLIP's with ``text_model.``.

    The words' vectors of T5 are saved under one of their two names.
    """
    found: dict[str, Tensor] = {}
    for component, module in components(family).items():
        for key, value in module.state_dict().items():
            bare = component == "text_encoder" and not key.startswith("text_")
            if key != "encoder.embed_tokens.weight":
                found[f"{component}.{'text_model.' if bare else ''}{key}"] = value.half()
    return found


def save_folder(folder: Path, family: str) -> Path:
    """Write a model as diffusers and transformers do, in half precision, with configs and an index; no tokenizers."""
    import diffusers

    classes: dict[str, Any] = {}
    for name, module in components(family).items():
        half = copy.deepcopy(module).half()
        half.save_pretrained(folder / name)
        classes[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
    scheduler = scheduler_of(family)
    scheduler.save_pretrained(folder / "scheduler")
    classes["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name in [name for name in classes if name.startswith("text_encoder")]:
        kind = "T5TokenizerFast" if classes[name][1] == "T5EncoderModel" else "CLIPTokenizer"
        classes[name.replace("text_encoder", "tokenizer")] = ["transformers", kind]
    index = {"_class_name": PIPELINES[family], "_diffusers_version": diffusers.__version__, **classes}
    if family in ("sd1", "sd2"):
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def scheduler_of(family: str) -> Any:
    """Return a scheduler as the family's models have it."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if family.startswith(("sd3", "flux")):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family.startswith("sdxl"):
        return EulerDiscreteScheduler(**betas, steps_offset=1)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    return DDIMScheduler(**betas, steps_offset=1, clip_sample=False, prediction_type=prediction)
