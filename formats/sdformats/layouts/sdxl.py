"""Stable Diffusion XL: pooled text and sizes join the time embedding. The base has three levels, the refiner four."""

from __future__ import annotations

from sdformats.keymap import Component, KeyMap
from sdformats.layout import DIFFUSERS, SINGLE_FILE, Facts, Layout
from sdformats.layouts import clip
from sdformats.layouts.sd import variant
from sdformats.layouts.unet import UNET
from sdformats.layouts.vae import VAE


def _pooled_text(facts: Facts) -> bool:
    return facts.has(r"label_emb\.0\.|add_embedding\.")


def _three_levels(facts: Facts) -> bool:
    return facts.count(r"input_blocks\.(\d+)\.") == 9 or facts.count(r"down_blocks\.(\d+)\.") == 3


def _four_levels(facts: Facts) -> bool:
    return facts.count(r"input_blocks\.(\d+)\.") == 12 or facts.count(r"down_blocks\.(\d+)\.") == 4


def _deep(facts: Facts) -> bool:
    return facts.count(r"(?:input_blocks|down_blocks)\..*?transformer_blocks\.(\d+)\.") > 1


def _two_encoders(facts: Facts) -> bool:
    return facts.holds("conditioner.embedders.1.")


def _one_encoder(facts: Facts) -> bool:
    return facts.holds("conditioner.embedders.0.model.") and not facts.holds("conditioner.embedders.1.")


LAYOUTS = (
    Layout("sdxl", SINGLE_FILE, (_three_levels, _pooled_text), (_deep, _two_encoders), variant),
    Layout("sdxl", DIFFUSERS, (_three_levels, _pooled_text), (_deep,), variant),
    Layout("sdxl-refiner", SINGLE_FILE, (_four_levels, _pooled_text, _deep), (_one_encoder,), variant),
    Layout("sdxl-refiner", DIFFUSERS, (_four_levels, _pooled_text, _deep), (), variant),
)

_CLIP = Component("text_encoder", ("conditioner.embedders.0.transformer.",), clip.table, dialect=clip.with_text_model)


def _open_clip(place: int) -> Component:
    prefix = f"conditioner.embedders.{place}.model."
    return Component("text_encoder_2", (prefix,), clip.open_clip, dialect=clip.with_text_model)


KEY_MAPS = {
    "sdxl": KeyMap((UNET, VAE, _CLIP, _open_clip(1))),
    "sdxl-refiner": KeyMap((UNET, VAE, _open_clip(0))),
}
