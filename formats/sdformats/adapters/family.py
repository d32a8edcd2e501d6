"""For which family an adapter is: by its modules, the text that its cross-attention reads, and what its trainer wrote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sdformats.adapters.adapter import Adapter

_BY_TEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
_FLUX_WIDTH, SD3_WIDTHS = 3072, (1536, 2432)
_DEEPER = re.compile(r"unet\..*\.transformer_blocks\.[1-9]\d*\.")
_LATER_LAYER = re.compile(r"te1\.text_model\.encoder\.layers\.(1[2-9]|2\d)\.")
_TRAINERS = (
    ("modelspec.architecture", (("stable-diffusion-xl", "sdxl"), ("stable-diffusion-v1", "sd1"), ("flux", "flux"))),
    (
        "modelspec.architecture",
        (("stable-diffusion-v2", "sd2"), ("stable-diffusion-v3", "sd3"), ("stable-diffusion-3", "sd3")),
    ),
    ("ss_base_model_version", (("sdxl", "sdxl"), ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sd3", "sd3"), ("flux", "flux"))),
)


def family_of(adapter: Adapter, tables: Collection[str] = ()) -> str | None:
    """Return the family, or None where nothing tells it.

    Args:
        adapter: what was read.
        tables: tables of names (see `names`) that its modules were found in.
    """
    for family in ("sd3", "flux"):  # names that both have are found in Flux's table
        if family in tables:
            return family
    paths = adapter.modules
    text = "\n".join(paths)
    if "unet.single_transformer_blocks." in text:
        return "flux"
    if re.search(r"^unet\.(transformer_blocks|joint|pos_embed|context_embedder|norm_out)", text, re.MULTILINE):
        return _transformer(adapter)
    return _by_width(adapter, text) or _told(adapter.metadata) or _by_text_encoder(adapter, text)


def _transformer(adapter: Adapter) -> str | None:
    if any(path.startswith("unet.pos_embed") or ".attn2." in path for path in adapter.modules):
        return "sd3"
    for path, record in adapter.modules.items():
        if path.startswith("unet.transformer_blocks.") and path.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v")):
            if record.columns == _FLUX_WIDTH:
                return "flux"
            if record.columns in SD3_WIDTHS:
                return "sd3"
    return _told(adapter.metadata)


def _by_width(adapter: Adapter, text: str) -> str | None:
    for path, record in adapter.modules.items():
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and record.columns in _BY_TEXT_WIDTH:
            return _BY_TEXT_WIDTH[record.columns]
    if "te2." in text or _DEEPER.search(text) or "unet.add_embedding" in text:
        return "sdxl"
    return None


def _by_text_encoder(adapter: Adapter, text: str) -> str | None:
    """Tell it by the width of the first text encoder; a CLIP-L alone is taken for SD1's."""
    if _LATER_LAYER.search(text):
        return "sd2"
    for path, record in adapter.modules.items():
        if path.startswith("te1.") and path.endswith(("_proj", ".fc1")):
            return {768: "sd1", 1024: "sd2"}.get(record.columns or 0)
    return None


def _told(metadata: Mapping[str, str]) -> str | None:
    """Return what a trainer wrote down."""
    for key, known in _TRAINERS:
        value = metadata.get(key, "").lower()
        for mark, family in known:
            if mark in value:
                return family
    return None
