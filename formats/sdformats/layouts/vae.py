"""The VAE of every family: the module names of compvis and of diffusers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.keymap import Component
from sdformats.rule import Rule, blocks, one

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdformats.rule import Table

_MIDDLE = {"block_1": "resnets.0", "block_2": "resnets.1"}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"((?:en|de)coder\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\.\w+)")


def modules(*, levels: int, layers: int) -> Table:
    """Return the rules of a VAE.

    Args:
        levels: how many resolutions it has; the decoder's are counted from the finest in a single file.
        layers: how many ResNets each has in the encoder; the decoder has one more.
    """
    found = {name: one(name) for name in ("quant_conv", "post_quant_conv")}

    def resnet(theirs: str, ours: str) -> None:
        found.update({f"{theirs}.{name}": one(f"{ours}.{mine}") for name, mine in _RESNET.items()})

    for b in range(levels):
        down, up = f"encoder.down.{b}", f"decoder.up.{levels - 1 - b}"
        for n in range(layers):
            resnet(f"{down}.block.{n}", f"encoder.down_blocks.{b}.resnets.{n}")
        for n in range(layers + 1):
            resnet(f"{up}.block.{n}", f"decoder.up_blocks.{b}.resnets.{n}")
        found[f"{down}.downsample.conv"] = one(f"encoder.down_blocks.{b}.downsamplers.0.conv")
        found[f"{up}.upsample.conv"] = one(f"decoder.up_blocks.{b}.upsamplers.0.conv")
    for side in ("encoder", "decoder"):
        for theirs, ours in _MIDDLE.items():
            resnet(f"{side}.mid.{theirs}", f"{side}.mid_block.{ours}")
        attention = f"{side}.mid_block.attentions.0."
        found[f"{side}.mid.attn_1.norm"] = one(f"{attention}group_norm")
        for theirs, ours in _ATTENTION.items():
            found[f"{side}.mid.attn_1.{theirs}"] = Rule((attention + ours,), pixel=True)
        found |= {f"{side}.{name}": one(f"{side}.{name}") for name in ("conv_in", "conv_out")}
        found[f"{side}.norm_out"] = one(f"{side}.conv_norm_out")
    return found


def table(names: Iterable[str]) -> Table:
    """Return the rules for the VAE whose tensors have these bare names, in either spelling."""
    there = tuple(names)
    levels = blocks(there, r"(?:encoder\.down|decoder\.up|encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.")
    encoder = blocks(there, r"encoder\.(?:down\.\d+\.block|down_blocks\.\d+\.resnets)\.(\d+)\.")
    decoder = blocks(there, r"decoder\.(?:up\.\d+\.block|up_blocks\.\d+\.resnets)\.(\d+)\.")
    return modules(levels=levels, layers=max(encoder, decoder - 1))


def _today(name: str) -> str:
    """Return a name as diffusers writes it since its attention was rewritten."""
    match = _OLD_NAME.fullmatch(name)
    return name if match is None else f"{match[1]}{_OLD_ATTENTION[match[2]]}{match[3]}"


VAE = Component("vae", ("first_stage_model.", "vae."), table, dialect=_today)
