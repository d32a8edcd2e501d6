"""Sizes of the networks: the UNet, SD3's transformer, Flux's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sdformats.configs.shapes import divisor, groups

if TYPE_CHECKING:
    from sdformats.configs.shapes import Shapes

_HEAD = 64
"""The width of a head in SD2, SDXL and SD3."""


def fill_unet(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in a UNet's sizes; return what is assumed. Arguments as `text.fill_clip`."""
    usual = config["block_out_channels"]
    levels = shapes.count(r"down_blocks\.(\d+)\.")
    channels = [shapes.size(f"down_blocks.{b}.resnets.0.conv1.weight") or 0 for b in range(levels)]
    if levels and all(channels):
        config["block_out_channels"] = channels
        for side, key in (("down", "Down"), ("up", "Up")):
            crossed = [shapes.has(f"{side}_blocks.{b}.attentions.") for b in range(levels)]
            config[f"{side}_block_types"] = [f"{'CrossAttn' if one else ''}{key}Block2D" for one in crossed]
        config["layers_per_block"] = shapes.count(r"down_blocks\.0\.resnets\.(\d+)\.")
        _fill_depths(config, shapes, levels)
    if not shapes.has("mid_block.attentions."):
        config["mid_block_type"] = "UNetMidBlock2D" if shapes.has("mid_block.") else None
    first = _first_attention(shapes, levels)
    shapes.fill(
        config,
        in_channels=("conv_in.weight", 1),
        out_channels=("conv_out.weight", 0),
        cross_attention_dim=(f"{first}.transformer_blocks.0.attn2.to_k.weight", 1),
        projection_class_embeddings_input_dim=("add_embedding.linear_1.weight", 1),
    )
    config["use_linear_projection"] = shapes.rank(f"{first}.proj_in.weight") == 2
    channels = config["block_out_channels"]
    return () if channels == usual else _assumed(config, channels, told=told)


def _assumed(config: dict[str, Any], channels: list[int], *, told: bool) -> tuple[str, ...]:
    """Fill in what shapes do not tell: how channels are divided."""
    heads = config["attention_head_dim"]
    number = groups(channels, config["norm_num_groups"])
    in_levels = heads if isinstance(heads, list) else [heads] * len(channels)
    fits = len(in_levels) == len(channels) and all(c % h == 0 for c, h in zip(channels, in_levels, strict=True) if h)
    if told and fits and number == config["norm_num_groups"]:
        return ()
    if isinstance(heads, list):
        config["attention_head_dim"] = [divisor(one, max(1, one // _HEAD)) for one in channels]
    else:
        config["attention_head_dim"] = groups(channels, heads)
    config["norm_num_groups"] = number
    return (f"{config['attention_head_dim']} attention heads", f"{number} groups in norms")


def _first_attention(shapes: Shapes, levels: int) -> str:
    places = [f"down_blocks.{b}.attentions.0" for b in range(levels)]
    return next((place for place in places if shapes.has(f"{place}.")), "mid_block.attentions.0")


def _fill_depths(config: dict[str, Any], shapes: Shapes, levels: int) -> None:
    """Fill in how many transformer blocks each attention has: for each level alike, or for each attention."""

    def depths(side: str, level: int) -> list[int]:
        place = rf"{side}_blocks\.{level}\.attentions\."
        number = shapes.count(rf"{place}(\d+)\.")
        return [shapes.count(rf"{place}{n}\.transformer_blocks\.(\d+)\.") for n in range(number)]

    down = [depths("down", b) for b in range(levels)]
    up = [depths("up", b) for b in range(levels)]
    middle = shapes.count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    even = [level[0] if level else (middle or 1 if b == levels - 1 else 1) for b, level in enumerate(down)]
    mirrored = zip(even, down, reversed(up), strict=True)
    if all(set(one) | set(other) <= {depth} for depth, one, other in mirrored) and middle in (0, even[-1]):
        usual = config["transformer_layers_per_block"]
        at = usual if isinstance(usual, list) else [usual] * levels
        same = len(at) == levels and all(not level or a == d for a, d, level in zip(at, even, down, strict=True))
        if not (same and middle in (0, at[-1])):
            config["transformer_layers_per_block"] = even if len(set(even)) > 1 else even[0]
        return
    config["transformer_layers_per_block"] = [level or 1 for level in down]
    config["reverse_transformer_layers_per_block"] = [level or 1 for level in up]


def fill_sd3(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in the sizes of SD3's transformer; return what is assumed. Arguments as `text.fill_clip`."""
    usual = config["caption_projection_dim"]
    shapes.fill(
        config,
        patch_size=("pos_embed.proj.weight", 2),
        in_channels=("pos_embed.proj.weight", 1),
        caption_projection_dim=("context_embedder.weight", 0),
        joint_attention_dim=("context_embedder.weight", 1),
        pooled_projection_dim=("time_text_embed.text_embedder.linear_1.weight", 1),
    )
    config["num_layers"] = layers = shapes.count(r"transformer_blocks\.(\d+)\.")
    config["dual_attention_layers"] = [n for n in range(layers) if shapes.has(f"transformer_blocks.{n}.attn2.")]
    positions = shapes.size("pos_embed.pos_embed", 1)
    if positions is not None:
        config["pos_embed_max_size"] = math.isqrt(positions)
    out = shapes.size("proj_out.weight", 0)
    if out is not None:
        config["out_channels"] = out // config["patch_size"] ** 2
    head = shapes.size("transformer_blocks.0.attn.norm_q.weight")
    config["qk_norm"] = None if head is None else "rms_norm"
    width = config["caption_projection_dim"]
    known = head is not None or width == usual or (told and width % config["attention_head_dim"] == 0)
    if not known:
        head = width // divisor(width, max(1, width // _HEAD))
    config["attention_head_dim"] = head or config["attention_head_dim"]
    config["num_attention_heads"] = width // config["attention_head_dim"]
    return () if known else (f"{config['num_attention_heads']} attention heads",)


def fill_flux(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in the sizes of Flux's transformer; return what is assumed. Arguments as `text.fill_clip`."""
    shapes.fill(
        config,
        in_channels=("x_embedder.weight", 1),
        joint_attention_dim=("context_embedder.weight", 1),
        pooled_projection_dim=("time_text_embed.text_embedder.linear_1.weight", 1),
        attention_head_dim=("transformer_blocks.0.attn.norm_q.weight", 0),
    )
    config["num_layers"] = shapes.count(r"transformer_blocks\.(\d+)\.")
    config["num_single_layers"] = shapes.count(r"single_transformer_blocks\.(\d+)\.")
    config["guidance_embeds"] = shapes.has("time_text_embed.guidance_embedder.")
    out = shapes.size("proj_out.weight", 0)
    config["out_channels"] = None if out == config["in_channels"] else out
    width, head = shapes.size("x_embedder.weight", 0), config["attention_head_dim"]
    if width is not None:
        config["num_attention_heads"] = width // head
    axes = config["axes_dims_rope"]
    if sum(axes) == head and (told or head == 128):
        return ()
    config["axes_dims_rope"] = [head - 2 * (7 * head // 16 // 2 * 2), *[7 * head // 16 // 2 * 2] * 2]
    return (f"{config['axes_dims_rope']} of each head's width turned by time, height and width",)
