"""T5's encoder: transformers' names in both spellings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.rule import as_they_are, blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdformats.rule import Table


TWIN = ("encoder.embed_tokens.weight", "shared.weight")
"""The words' vectors: published single files hold them under both names, folders under the second."""


def modules(layers: int) -> tuple[str, ...]:
    """Return the modules of an encoder."""
    found = ["shared", "encoder.embed_tokens"]
    for n in range(layers):
        block = f"encoder.block.{n}.layer."
        found += [f"{block}0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")]
        found += [f"{block}0.layer_norm", f"{block}1.layer_norm"]
        found += [f"{block}1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    return (*found, "encoder.final_layer_norm")


def table(names: Iterable[str]) -> Table:
    """Return the rules for an encoder whose tensors have these bare names."""
    return as_they_are(modules(blocks(names, r"encoder\.block\.(\d+)\.")))
