"""Sizes of a VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdformats.configs.shapes import groups

if TYPE_CHECKING:
    from sdformats.configs.shapes import Shapes


def fill_vae(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in a VAE's sizes; return what is assumed. Arguments as `text.fill_clip`."""
    usual = config["block_out_channels"]
    levels = shapes.count(r"encoder\.down_blocks\.(\d+)\.")
    channels = [shapes.size(f"encoder.down_blocks.{b}.resnets.0.conv1.weight") or 0 for b in range(levels)]
    if levels and all(channels):
        config["block_out_channels"] = channels
        config["down_block_types"] = ["DownEncoderBlock2D"] * levels
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
        config["layers_per_block"] = shapes.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    shapes.fill(
        config,
        in_channels=("encoder.conv_in.weight", 1),
        out_channels=("decoder.conv_out.weight", 0),
        latent_channels=("decoder.conv_in.weight", 1),
    )
    config["use_quant_conv"] = shapes.has("quant_conv.")
    config["use_post_quant_conv"] = shapes.has("post_quant_conv.")
    config["mid_block_add_attention"] = shapes.has("decoder.mid_block.attentions.")
    channels = config["block_out_channels"]
    number = groups(channels, config["norm_num_groups"])
    if channels == usual or (told and number == config["norm_num_groups"]):
        return ()
    config["norm_num_groups"] = number
    return (f"{number} groups in norms",)
