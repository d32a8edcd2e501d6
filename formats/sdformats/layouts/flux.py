"""Flux: double blocks, then single blocks."""

from __future__ import annotations

from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout


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
