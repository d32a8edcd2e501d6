"""Stable Diffusion 1 and 2: a UNet of four levels. SD1 projects into its attention by convolution, SD2 linearly."""

from __future__ import annotations

from sdformats.keymap import Component, KeyMap
from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout
from sdformats.layouts import clip
from sdformats.layouts.unet import UNET
from sdformats.layouts.vae import VAE

_PROJ_IN = r"(input_blocks\.\d+\.1|down_blocks\.\d+\.attentions\.\d+)\.proj_in\.weight"


def variant(facts: Facts) -> str:
    """Tell the variant by the channels that the first convolution reads: latents, and what is stacked on them."""
    first = "input_blocks.0.0.weight" if facts.spelling == SINGLE_FILE else "conv_in.weight"
    names = {9: "inpainting", 8: "pix2pix", 5: "depth", 7: "upscaler"}
    return names.get(facts.width(first) or 4, "base")


def _unclip(facts: Facts) -> str:
    return "unclip" if facts.has(r"label_emb\.|class_embedding\.") else variant(facts)


def _four_levels(facts: Facts) -> bool:
    return facts.count(r"input_blocks\.(\d+)\.") == 12 or facts.count(r"down_blocks\.(\d+)\.") == 4


def _shallow(facts: Facts) -> bool:
    return facts.count(r"(?:input_blocks|down_blocks)\..*?transformer_blocks\.(\d+)\.") == 1


def _no_pooled_text(facts: Facts) -> bool:
    return not facts.has(r"add_embedding\.")


def _convolution(facts: Facts) -> bool:
    return facts.rank(_PROJ_IN) == 4


def _linear(facts: Facts) -> bool:
    return facts.rank(_PROJ_IN) == 2


def _still(facts: Facts) -> bool:
    """Tell it from video models, which stack layers over time on an SD2."""
    return not facts.has(r"(input_blocks|down_blocks)\..*(time_stack|time_mix|temporal|temopral)")


def _no_label(facts: Facts) -> bool:
    return not facts.has(r"label_emb\.")


def _clip(facts: Facts) -> bool:
    return facts.holds("cond_stage_model.transformer.")


def _open_clip(facts: Facts) -> bool:
    return facts.holds("cond_stage_model.model.")


LAYOUTS = (
    Layout("sd1", SINGLE_FILE, (_four_levels, _shallow, _convolution, _no_label), (_clip,), variant),
    Layout("sd1", DIFFUSERS, (_four_levels, _shallow, _convolution, _no_pooled_text), (), variant),
    Layout("sd2", SINGLE_FILE, (_four_levels, _shallow, _linear, _still), (_open_clip,), _unclip),
    Layout("sd2", DIFFUSERS, (_four_levels, _shallow, _linear, _still, _no_pooled_text), (), _unclip),
)

_CLIP = Component("text_encoder", ("cond_stage_model.transformer.",), clip.table, dialect=clip.with_text_model)
_OPEN_CLIP = Component(
    "text_encoder", ("cond_stage_model.model.",), clip.open_clip_without_its_end, dialect=clip.with_text_model
)
KEY_MAPS = {"sd1": KeyMap((UNET, VAE, _CLIP)), "sd2": KeyMap((UNET, VAE, _OPEN_CLIP))}
