"""CLIP's text encoders: the module names of transformers, which single files have too, and of OpenCLIP."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.rule import NAKED, Rule, as_they_are, blocks, one

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdformats.rule import Table

_NO_TEXT_MODEL = re.compile(r"(encoder\.layers\.|embeddings\.|final_layer_norm\.)")
_LAYERS = r"(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d+)\."
_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


def modules(layers: int) -> tuple[str, ...]:
    """Return the modules of an encoder as transformers names them, the projection of its result included."""
    inside = (*(f"self_attn.{name}_proj" for name in "kvq"), "self_attn.out_proj")
    inside += ("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2")
    of_layers = (f"text_model.encoder.layers.{n}.{name}" for n in range(layers) for name in inside)
    embeddings = (f"text_model.embeddings.{name}_embedding" for name in ("token", "position"))
    return (*embeddings, *of_layers, "text_model.final_layer_norm", "text_projection")


def open_clip_modules(layers: int) -> Table:
    """Return the rules of OpenCLIP's encoder: q, k and v are one tensor, and the projection is transposed."""
    found: Table = {
        "token_embedding": one("text_model.embeddings.token_embedding"),
        "positional_embedding": Rule(("text_model.embeddings.position_embedding",), ends=NAKED),
        "ln_final": one("text_model.final_layer_norm"),
        "text_projection": Rule(("text_projection",), transposed=True, ends=NAKED),
    }
    for n in range(layers):
        theirs, ours = f"transformer.resblocks.{n}.", f"text_model.encoder.layers.{n}."
        found |= {theirs + name: one(ours + mine) for name, mine in _OPEN_CLIP.items()}
        fused = Rule(tuple(ours + name for name in _QKV), (1, 1, 1), ends=(("_weight", ".weight"), ("_bias", ".bias")))
        found[f"{theirs}attn.in_proj"] = fused
    return found


def table(names: Iterable[str]) -> Table:
    """Return the rules for an encoder with transformers' names, without a projection."""
    return as_they_are(modules(blocks(names, _LAYERS))[:-1])


def projected(names: Iterable[str]) -> Table:
    """Return the rules for an encoder with transformers' names, with its projection."""
    return as_they_are(modules(blocks(names, _LAYERS)))


def open_clip(names: Iterable[str]) -> Table:
    """Return the rules for OpenCLIP's encoder."""
    return open_clip_modules(blocks(names, _LAYERS))


def open_clip_without_its_end(names: Iterable[str]) -> Table:
    """Return the rules for OpenCLIP's encoder where the last layer but one is what counts (SD2).

    Diffusers keeps neither the last layer nor the projection. Where a single file has no projection, it has been without
    its end already.
    """
    there = tuple(names)
    whole = "text_projection" in there
    found = open_clip_modules(blocks(there, _LAYERS) - whole)
    del found["text_projection"]
    return found


def with_text_model(name: str) -> str:
    """Return a name with the ``text_model.`` that transformers leaves out since 5.6, and the oldest releases did."""
    return f"text_model.{name}" if _NO_TEXT_MODEL.match(name) else name
