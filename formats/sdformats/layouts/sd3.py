"""Stable Diffusion 3 and 3.5: a transformer of joint blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.keymap import Component, KeyMap
from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout
from sdformats.layouts import clip, t5
from sdformats.layouts.vae import VAE
from sdformats.rule import NAKED_IN_BOTH, Rule, blocks, one

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdformats.rule import Table

_LARGE_DEPTH = 38


def _variant(facts: Facts) -> str:
    blocks = facts.count(r"(?:joint_blocks|transformer_blocks)\.(\d+)\.")
    if blocks == _LARGE_DEPTH:
        return "3.5-large"
    dual = facts.has(r"joint_blocks\.\d+\.x_block\.attn2\.|transformer_blocks\.\d+\.attn2\.")
    return "3.5-medium" if dual else "base"


def _joint_blocks(facts: Facts) -> bool:
    return facts.has(r"joint_blocks\.\d+\.context_block\.")


def _joint_attention(facts: Facts) -> bool:
    return facts.has(r"transformer_blocks\.\d+\.attn\.add_k_proj\.") and not facts.has(r"single_transformer_blocks\.")


def _positions(facts: Facts) -> bool:
    """Tell it from later transformers with the same attention, which rotate instead of adding positions."""
    return facts.has(r"pos_embed")


LAYOUTS = (
    Layout("sd3", SINGLE_FILE, (_joint_blocks, _positions), (), _variant),
    Layout("sd3", DIFFUSERS, (_joint_attention, _positions), (), _variant),
)


def modules(*, depth: int, ends: bool = True) -> Table:
    """Return the rules of a transformer.

    Args:
        depth: how many blocks it has.
        ends: whether the last of them is the model's last, whose context norm has no more than a shift and a scale.
    """
    found: Table = {
        "pos_embed": Rule(("pos_embed.pos_embed",), ends=NAKED_IN_BOTH),
        "x_embedder.proj": one("pos_embed.proj"),
        "context_embedder": one("context_embedder"),
    }
    for theirs, ours in (("t", "timestep"), ("y", "text")):
        for n in range(2):
            found[f"{theirs}_embedder.mlp.{2 * n}"] = one(f"time_text_embed.{ours}_embedder.linear_{n + 1}")
    for n in range(depth):
        ours, x, context = f"transformer_blocks.{n}.", f"joint_blocks.{n}.x_block.", f"joint_blocks.{n}.context_block."
        found[f"{x}attn.qkv"] = Rule(tuple(f"{ours}attn.to_{c}" for c in "qkv"), (1, 1, 1))
        found[f"{x}attn2.qkv"] = Rule(tuple(f"{ours}attn2.to_{c}" for c in "qkv"), (1, 1, 1))
        found[f"{context}attn.qkv"] = Rule(tuple(f"{ours}attn.add_{c}_proj" for c in "qkv"), (1, 1, 1))
        found |= {f"{x}attn.proj": one(f"{ours}attn.to_out.0"), f"{x}attn2.proj": one(f"{ours}attn2.to_out.0")}
        found[f"{context}attn.proj"] = one(f"{ours}attn.to_add_out")
        for theirs, mine in ((x, "ff"), (context, "ff_context")):
            found[f"{theirs}mlp.fc1"] = one(f"{ours}{mine}.net.0.proj")
            found[f"{theirs}mlp.fc2"] = one(f"{ours}{mine}.net.2")
        for theirs, mine in ((f"{x}attn.ln_", "attn.norm_"), (f"{x}attn2.ln_", "attn2.norm_")):
            found |= {f"{theirs}{c}": one(f"{ours}{mine}{c}") for c in "qk"}
        found |= {f"{context}attn.ln_{c}": one(f"{ours}attn.norm_added_{c}") for c in "qk"}
        found[f"{x}adaLN_modulation.1"] = one(f"{ours}norm1.linear")
        last = ends and n == depth - 1
        norm = Rule((f"{ours}norm1_context.linear",), swapped=last, swapped_alone=not ends)
        found[f"{context}adaLN_modulation.1"] = norm
    found["final_layer.adaLN_modulation.1"] = Rule(("norm_out.linear",), swapped=True)
    return found | {"final_layer.linear": one("proj_out")}


def table(names: Iterable[str]) -> Table:
    """Return the rules for the transformer whose tensors have these bare names, in either spelling."""
    return modules(depth=blocks(names, r"(?:joint_blocks|transformer_blocks)\.(\d+)\."))


_ENCODERS = "text_encoders.{}.transformer."
KEY_MAPS = {
    "sd3": KeyMap(
        (
            Component("transformer", ("model.diffusion_model.", "diffusion_model."), table),
            VAE,
            Component(
                "text_encoder",
                (_ENCODERS.format("clip_l"),),
                clip.table,
                dialect=clip.with_text_model,
                identity=("text_projection.weight", "text_model.final_layer_norm.weight"),
            ),
            Component("text_encoder_2", (_ENCODERS.format("clip_g"),), clip.projected, dialect=clip.with_text_model),
            Component("text_encoder_3", (_ENCODERS.format("t5xxl"),), t5.table, twin=t5.TWIN),
        )
    )
}
