"""Sizes of text encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdformats.configs.shapes import divisor

if TYPE_CHECKING:
    from sdformats.configs.shapes import Shapes

_HEAD = 64
"""The width of a head in every published CLIP."""


def fill_clip(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in CLIP's sizes; return what is assumed.

    Args:
        config: the family's, to be changed.
        shapes: of the component's tensors, with ``text_model.``.
        told: whether the config is that of this very model, so that what shapes do not tell is known.
    """
    usual = config["hidden_size"]
    shapes.fill(
        config,
        hidden_size=("text_model.final_layer_norm.weight", 0),
        intermediate_size=("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        vocab_size=("text_model.embeddings.token_embedding.weight", 0),
        max_position_embeddings=("text_model.embeddings.position_embedding.weight", 0),
        projection_dim=("text_projection.weight", 0),
    )
    config["num_hidden_layers"] = shapes.count(r"text_model\.encoder\.layers\.(\d+)\.") or config["num_hidden_layers"]
    width = config["hidden_size"]
    if width == usual or (told and width % config["num_attention_heads"] == 0):
        return ()
    config["num_attention_heads"] = divisor(width, max(1, width // _HEAD))
    return (f"{config['num_attention_heads']} attention heads",)


def fill_t5(config: dict[str, Any], shapes: Shapes, *, told: bool) -> tuple[str, ...]:
    """Fill in T5's sizes, all of which its tensors tell. Arguments as `fill_clip`."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    shapes.fill(
        config,
        d_model=("encoder.final_layer_norm.weight", 0),
        d_ff=("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        vocab_size=("encoder.embed_tokens.weight", 0),
        num_heads=(f"{attention}relative_attention_bias.weight", 1),
        relative_attention_num_buckets=(f"{attention}relative_attention_bias.weight", 0),
    )
    shapes.fill(config, vocab_size=("shared.weight", 0))
    layers = shapes.count(r"encoder\.block\.(\d+)\.")
    if layers:
        config["num_layers"] = config["num_decoder_layers"] = layers
    inner = shapes.size(f"{attention}q.weight", 0)
    if inner is not None:
        config["d_kv"] = inner // max(1, config["num_heads"])
    return ()
