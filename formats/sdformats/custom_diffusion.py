"""Custom Diffusion's deltas: keys and values of the cross-attention, and the vectors of new words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks

_KEYS_AND_VALUES = r"attn2\.to_[kv]\.weight"
_WORDS = r"^modifier_token\."
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def _family(looks: Looks) -> str | None:
    """Tell it by the width of the text that the keys read."""
    for name, spec in looks.specs.items():
        if re.search(r"attn2\.(processor\.)?to_k", name) and len(spec.shape) == 2 and not name.endswith(".u"):
            return _WIDTHS.get(spec.shape[1])
    return None


KIND = Kind(
    name="custom-diffusion",
    title="a Custom Diffusion delta",
    layouts=(
        Marked(
            name="original",
            marks=(rf"^model\.diffusion_model\..*{_KEYS_AND_VALUES}$", r"^embed$"),
            needs=(_KEYS_AND_VALUES,),
        ),
        Marked(
            name="delta",
            marks=(rf"^unet\..*{_KEYS_AND_VALUES}$", _WORDS, r"^text_encoder\."),
            needs=(rf"^unet\..*{_KEYS_AND_VALUES}$",),
        ),
        Marked(
            name="compressed",
            marks=(rf"^unet\..*{_KEYS_AND_VALUES}\.[uv]$", _WORDS, r"^text_encoder\."),
            needs=(rf"{_KEYS_AND_VALUES}\.u$",),
        ),
        Marked(name="diffusers", marks=(r"\.processor\.to_(k|v|q|out\.0)_custom_diffusion\.(weight|bias)$",)),
    ),
    family=_family,
)
