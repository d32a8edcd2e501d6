"""How an adapter is known, before its layout is: by parts of names that only adapters have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import Spec

_MARKS = (
    r"\.(lora_(down|up|mid|A|B)|lora\.(down|up)|lora_linear_layer\.(down|up))(\.|$)",
    r"_lora\d?\.(down|up)\.",
    r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag|dora_scale|diff|diff_b|w_norm)$",
    r"^\w+:\d+:(up|down)$",
    r"\.___\.|^lora_controlnet$|\.ia3_l|\.boft_",
)
_CROSS_KEY = re.compile(
    r"attn2[._](?:processor[._])?to_[kv](?:_lora)?[._](?:lora[._])?(?:lora_)?(?:down|A|linear_layer\.down)"
)
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def _family(looks: Looks) -> str | None:
    """Tell an adapter's family by its block names, or by the width of the text that its cross-attention reads."""
    specs = looks.specs
    names = " ".join(specs)
    if "double_blocks" in names or "single_transformer_blocks" in names:
        return "flux"
    if "joint_blocks" in names or "attn_add_q_proj" in names or "attn.add_q_proj" in names:
        return "sd3"
    if "lora_te2_" in names or "text_encoder_2." in names:
        return "sdxl"
    for name, spec in specs.items():
        if _CROSS_KEY.search(name) and len(spec.shape) >= 2 and spec.shape[1] in _WIDTHS:
            return _WIDTHS[spec.shape[1]]
    inputs = {
        spec.shape[1]
        for name, spec in specs.items()
        if name.endswith((":down", ".lora_A.weight")) and len(spec.shape) > 1
    }
    if "text_model" in names or ":down" in names:
        return next((family for width, family in _WIDTHS.items() if width in inputs), _text_family(specs))
    return None


def _text_family(specs: Mapping[str, Spec]) -> str | None:
    """Tell it by the text encoder's width, or by LoKr's factors of a known module."""
    for name, spec in specs.items():
        if "text_model" in name and name.endswith("lora_down.weight") and spec.shape[-1] in (768, 1024):
            return _WIDTHS[spec.shape[-1]]
    lokr = any("lokr_" in name for name in specs)
    return "sd1" if lokr and any("lora_te_text_model_encoder_layers_11_" in name for name in specs) else None


KIND = Kind(
    name="adapter",
    title="an adapter (LoRA or one of its relatives)",
    layouts=(Marked(name="any", marks=_MARKS, whole=False),),
    family=_family,
    tells_layout=False,
)
