"""Flux: double blocks, then single blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.keymap import Component, KeyMap
from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout
from sdformats.layouts import clip, t5
from sdformats.layouts.vae import VAE
from sdformats.rule import Rule, blocks, one

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdformats.rule import Table

_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_EMBEDDERS = {"time": "timestep", "vector": "text", "guidance": "guidance"}


def _variant(facts: Facts) -> str:
    """Tell fill by the mask and picture stacked on its input: six times as many channels as it puts out."""
    into = facts.width("img_in.weight") or facts.width("x_embedder.weight")
    out = facts.width("final_layer.linear.weight", 0) or facts.width("proj_out.weight", 0)
    if into and out and into == 6 * out:
        return "fill"
    if into and out and into == 2 * out:
        return "control"
    guided = facts.has(r"guidance_in\.|time_text_embed\.guidance_embedder\.")
    return "dev" if guided else "schnell"


def _double_blocks(facts: Facts) -> bool:
    return facts.has(r"double_blocks\.\d+\.img_attn\.")


def _single_blocks(facts: Facts) -> bool:
    return facts.has(r"single_blocks\.\d+\.")


def _single_transformer_blocks(facts: Facts) -> bool:
    return facts.has(r"single_transformer_blocks\.\d+\.")


def _own_modulation(facts: Facts) -> bool:
    """Tell it from Flux.2, whose blocks share theirs, and from video models, which patch in three dimensions."""
    return facts.has(r"double_blocks\.\d+\.img_mod\.|transformer_blocks\.\d+\.norm1_context\.")


def _flat_patches(facts: Facts) -> bool:
    return facts.rank(r"(img_in|x_embedder)\.weight") == 2


LAYOUTS = (
    Layout("flux", SINGLE_FILE, (_double_blocks, _own_modulation, _flat_patches), (_single_blocks,), _variant),
    Layout("flux", DIFFUSERS, (_single_transformer_blocks, _own_modulation, _flat_patches), (), _variant),
)


def modules(*, double: int, single: int) -> Table:
    """Return the rules of a transformer with as many double and single blocks."""
    found: Table = {"img_in": one("x_embedder"), "txt_in": one("context_embedder")}
    for theirs, ours in _EMBEDDERS.items():
        for n, layer in enumerate(("in_layer", "out_layer"), start=1):
            found[f"{theirs}_in.{layer}"] = one(f"time_text_embed.{ours}_embedder.linear_{n}")
    for n in range(double):
        theirs, ours = f"double_blocks.{n}.", f"transformer_blocks.{n}."
        found[f"{theirs}img_attn.qkv"] = Rule(tuple(f"{ours}attn.to_{x}" for x in "qkv"), (1, 1, 1))
        found[f"{theirs}txt_attn.qkv"] = Rule(tuple(f"{ours}attn.add_{x}_proj" for x in "qkv"), (1, 1, 1))
        found |= _renamed(theirs, ours, _DOUBLE, _DOUBLE_NORMS)
    for n in range(single):
        theirs, ours = f"single_blocks.{n}.", f"single_transformer_blocks.{n}."
        fused = (*(f"{ours}attn.to_{x}" for x in "qkv"), f"{ours}proj_mlp")
        found[f"{theirs}linear1"] = Rule(fused, (1, 1, 1, 4))
        found |= _renamed(theirs, ours, _SINGLE, _SINGLE_NORMS)
    found["final_layer.adaLN_modulation.1"] = Rule(("norm_out.linear",), swapped=True)
    return found | {"final_layer.linear": one("proj_out")}


def _renamed(theirs: str, ours: str, plain: dict[str, str], norms: dict[str, str]) -> Table:
    found = {theirs + name: one(ours + mine) for name, mine in plain.items()}
    return found | {theirs + name: Rule((ours + mine,), ends=((".scale", ".weight"),)) for name, mine in norms.items()}


def table(names: Iterable[str]) -> Table:
    """Return the rules for the transformer whose tensors have these bare names, in either spelling."""
    there = tuple(names)
    return modules(
        double=blocks(there, r"(?:double_blocks|transformer_blocks)\.(\d+)\."),
        single=blocks(there, r"(?:single_blocks|single_transformer_blocks)\.(\d+)\."),
    )


KEY_MAPS = {
    "flux": KeyMap(
        (
            Component("transformer", ("model.diffusion_model.", "diffusion_model."), table),
            replace(VAE, prefixes=("vae.", "first_stage_model.")),
            Component("text_encoder", ("text_encoders.clip_l.transformer.",), clip.table, dialect=clip.with_text_model),
            Component("text_encoder_2", ("text_encoders.t5xxl.transformer.",), t5.table, twin=t5.TWIN),
        )
    )
}
