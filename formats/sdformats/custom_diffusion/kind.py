"""How a delta is known, and in which form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import Spec

SGM = "model.diffusion_model."
"""What the first implementation's names begin with."""
MODULE = r"attn2\.(?:to_[kvq]\.weight|to_out\.0\.(?:weight|bias))"
WORD = "modifier_token."
TEXT = "text_encoder."
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def family_of(specs: Mapping[str, Spec]) -> str | None:
    """Tell it by the width of the text that the keys read."""
    for name, spec in specs.items():
        if re.search(r"attn2\.(processor\.)?to_[kv]", name) and len(spec.shape) == 2 and not name.endswith(".u"):
            return _WIDTHS.get(spec.shape[1])
    return None


BESIDE = (rf"^{re.escape(WORD)}", rf"^{re.escape(TEXT)}", r"^embed$")
DIFFUSERS = r"\.attn2\.processor\.to_(?:[kvq]_custom_diffusion|out_custom_diffusion\.0)\.(?:weight|bias)$"
KIND = Kind(
    name="custom-diffusion",
    title="a Custom Diffusion delta",
    layouts=(
        Marked(name="original", marks=(rf"^{re.escape(SGM)}.*{MODULE}$", r"^embed$"), needs=(rf"{MODULE}$",)),
        Marked(name="delta", marks=(rf"^unet\..*{MODULE}$", *BESIDE), needs=(rf"^unet\..*{MODULE}$",)),
        Marked(
            name="compressed",
            marks=(
                rf"^(unet\.|{re.escape(SGM)}).*{MODULE}\.[uv]$",
                rf"^(unet\.|{re.escape(SGM)}).*{MODULE}$",
                *BESIDE,
            ),
            needs=(rf"{MODULE}\.u$",),
        ),
        Marked(name="diffusers", marks=(DIFFUSERS, BESIDE[0]), needs=(DIFFUSERS,)),
    ),
    family=lambda looks: family_of(looks.specs),
)
