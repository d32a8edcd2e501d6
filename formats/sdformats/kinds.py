"""Files that are no model of their own: adapters, embeddings, hypernetworks and the like, told by their keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import Spec

_ADAPTER = re.compile(
    r"(\.(lora_(down|up|mid|A|B)|lora\.(down|up)|lora_linear_layer\.(down|up))(\.|$)"
    r"|_lora\d?\.(down|up)\.|\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag|dora_scale|diff|diff_b|w_norm)$"
    r"|^\w+:\d+:(up|down)$|\.___\.|^lora_controlnet$|\.ia3_l|\.boft_)"
)
_HYPERNETWORK = re.compile(r"^(320|640|768|1024|1280|2048|\d+)\.[01]\.(linear|linear1|linear2)\.?")
_CROSS_KEY = re.compile(
    r"attn2[._](?:processor[._])?to_[kv](?:_lora)?[._](?:lora[._])?(?:lora_)?(?:down|A|linear_layer\.down)"
)
_EMBEDDING = re.compile(r"^(string_to_param\..*|emb_params|emp_params|clip_[lg]|emb2?|t5(xxl)?|<.*>|\*)$")
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Kind:
    """What a file is that is no model, and for which family, where a width tells."""

    kind: str
    family: str | None = None
    warnings: tuple[str, ...] = ()


def kind_of(specs: Mapping[str, Spec]) -> Kind | None:
    """Return what a set of tensors is where it is no model of its own, else None."""
    if not specs:
        return Kind("other", warnings=("there is no tensor in it",))
    if any(_ADAPTER.search(name) for name in specs):
        return Kind("adapter", _adapter_family(specs))
    if any(name.startswith(("control_model.", "controlnet_")) for name in specs):
        return Kind("controlnet")
    if all(_HYPERNETWORK.match(name) for name in specs):
        return Kind("hypernetwork")
    return _vectors(specs)


def _vectors(specs: Mapping[str, Spec]) -> Kind | None:
    """Tell embeddings and aesthetic vectors: few tensors of rank 1 or 2."""
    floats = {name: spec for name, spec in specs.items() if spec.dtype.is_float}
    if not floats or len(floats) > 8 or any(not 1 <= len(spec.shape) <= 2 for spec in floats.values()):
        return None
    widths = {spec.shape[-1] for spec in floats.values()}
    if list(floats) == [""]:
        if widths == {768} and next(iter(floats.values())).numel == 768:
            return Kind("aesthetic", "sd1", ("a bare vector: it may also be a textual-inversion embedding",))
        return None
    named = any(_EMBEDDING.match(name) for name in floats)
    lone = len(floats) == 1 and widths <= {768, 1024, 1280} and next(iter(floats.values())).numel <= 1280 * 256
    if not (named or (lone and not any("." in name for name in floats))):
        return None
    family = "sdxl" if {768, 1280} <= widths else _WIDTHS.get(next(iter(widths))) if len(widths) == 1 else None
    return Kind("embedding", family)


def _adapter_family(specs: Mapping[str, Spec]) -> str | None:
    """Tell an adapter's family by its block names, or by the width of the text that its cross-attention reads."""
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
