"""The picture of ranks: layers stand in the order of the model."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from sdmerge.lora.rank_plot import in_order, painted

UNET = (
    *("te1.text_model.encoder.layers.0.mlp.fc1", "te2.text_projection", "unet.conv_in", "unet.time_embedding.linear_1"),
    *("unet.add_embedding.linear_1", "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.10.resnets.0.conv1"),
    *("unet.mid_block.resnets.0.conv1", "unet.up_blocks.2.resnets.0.conv1", "unet.conv_out"),
)
FLUX = (
    *("te1.text_model.encoder.layers.0.mlp.fc1", "te3.encoder.block.0.layer.0.SelfAttention.q", "unet.x_embedder"),
    *("unet.context_embedder", "unet.time_text_embed.text_embedder.linear_1", "unet.transformer_blocks.2.attn.to_q"),
    *("unet.transformer_blocks.10.attn.to_q", "unet.single_transformer_blocks.0.proj_mlp"),
    *("unet.single_transformer_blocks.11.proj_mlp", "unet.proj_out"),
)


@pytest.mark.parametrize("names", [UNET, FLUX])
def test_layers_stand_in_the_order_of_the_model(names: tuple[str, ...]) -> None:
    for seed in range(5):
        assert in_order(random.Random(seed).sample(names, len(names))) == list(names)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_any_number_of_layers_makes_a_picture(count: int) -> None:
    data = painted({name: {"rank": 2, "energy": 0.5} for name in FLUX[:count]})
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(1 << 16)
    green = {colour: number for number, colour in colours}.get((102, 170, 85), 0)
    assert (green > 10_000) == (count > 0)
