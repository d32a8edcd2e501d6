"""The UNet of Stable Diffusion 1, 2 and XL: the module names of sgm (compvis) and of diffusers.

A level on the way down is `layers` ResNets, each with attention or without, and a downsampler; on the way up it is one more
ResNet, and an upsampler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.keymap import Component
from sdformats.rule import blocks, one

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sdformats.rule import Table

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def modules(*, levels: int, layers: int, depth: int, attended: Collection[int]) -> Table:
    """Return the rules of a UNet.

    Args:
        levels: how many resolutions it has.
        layers: how many ResNets each has on the way down.
        depth: how many transformer blocks an attention has at most.
        attended: the levels on the way up, counted from the middle, that have attention: their upsampler stands behind it.
    """
    found: Table = {}

    def block(ours: str, theirs: str, kind: str) -> None:
        names = _RESNET.items() if kind == "resnets" else ((name, name) for name in _inside_transformer(depth))
        found.update({f"{theirs}.{name}": one(f"{ours}.{mine}") for mine, name in names})

    step = layers + 1
    for b in range(levels):
        for place, kind in enumerate(("resnets", "attentions")):
            for n in range(layers):
                block(f"down_blocks.{b}.{kind}.{n}", f"input_blocks.{1 + step * b + n}.{place}", kind)
            for n in range(step):
                block(f"up_blocks.{b}.{kind}.{n}", f"output_blocks.{step * b + n}.{place}", kind)
        found[f"input_blocks.{step * (b + 1)}.0.op"] = one(f"down_blocks.{b}.downsamplers.0.conv")
        behind = 2 if b in attended else 1
        found[f"output_blocks.{step * b + layers}.{behind}.conv"] = one(f"up_blocks.{b}.upsamplers.0.conv")
    for n in range(2):
        block(f"mid_block.resnets.{n}", f"middle_block.{2 * n}", "resnets")
    block("mid_block.attentions.0", "middle_block.1", "attentions")
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        found |= {f"{theirs}.{2 * n}": one(f"{ours}.linear_{n + 1}") for n in range(2)}
    return found | {"input_blocks.0.0": one("conv_in"), "out.0": one("conv_norm_out"), "out.2": one("conv_out")}


def _inside_transformer(depth: int) -> Iterator[str]:
    yield from ("norm", "proj_in", "proj_out")
    for d in range(depth):
        block = f"transformer_blocks.{d}."
        yield from (f"{block}norm{n}" for n in (1, 2, 3))
        yield from (f"{block}attn{n}.{name}" for n in (1, 2) for name in _ATTENTION)
        yield from (f"{block}ff.net.{name}" for name in ("0.proj", "2"))


def table(names: Iterable[str]) -> Table:
    """Return the rules for the UNet whose tensors have these bare names, in either spelling."""
    there = set(names)
    inputs = blocks(there, r"input_blocks\.(\d+)\.")
    if inputs:
        first = next((n for n in range(inputs) if f"input_blocks.{n}.0.op.weight" in there), inputs)
        layers, levels = first - 1, inputs // max(1, first)
    else:
        layers, levels = blocks(there, r"down_blocks\.0\.resnets\.(\d+)\."), blocks(there, r"down_blocks\.(\d+)\.")
    attended = [
        b
        for b in range(levels)
        if f"up_blocks.{b}.attentions.{layers}.norm.weight" in there
        or f"output_blocks.{(layers + 1) * (b + 1) - 1}.1.norm.weight" in there
    ]
    depth = blocks(there, r".*\.transformer_blocks\.(\d+)\.")
    return modules(levels=levels, layers=layers, depth=depth, attended=attended)


UNET = Component("unet", ("model.diffusion_model.", "diffusion_model."), table, alone="model.diffusion_model.")
