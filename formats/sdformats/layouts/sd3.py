"""Stable Diffusion 3 and 3.5: a transformer of joint blocks."""

from __future__ import annotations

from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout

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
