"""The tables of module names: against the spellings that people know, and against the networks themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdformats.adapters import names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sdformats.rule import Rule

ATTENTION = "transformer_blocks.0.attn2.to_k"
SGM = [
    ("down_blocks.0.resnets.0.norm1", "input_blocks.1.0.in_layers.0"),
    ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
    ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
    ("down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
    ("mid_block.resnets.0.norm2", "middle_block.0.out_layers.0"),
    ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
    ("up_blocks.0.resnets.2.conv2", "output_blocks.2.0.out_layers.3"),
    (f"down_blocks.0.attentions.0.{ATTENTION}", f"input_blocks.1.1.{ATTENTION}"),
    ("down_blocks.1.attentions.1.proj_in", "input_blocks.5.1.proj_in"),
    (f"mid_block.attentions.0.{ATTENTION}", f"middle_block.1.{ATTENTION}"),
    ("up_blocks.1.attentions.2.norm", "output_blocks.5.1.norm"),
    ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
    (
        "up_blocks.0.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "output_blocks.0.1.transformer_blocks.9.ff.net.0.proj",
    ),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
DOUBLE, SINGLE, BLOCK = "double_blocks.18.", "single_blocks.37.", "transformer_blocks.18."
FLUX = {
    DOUBLE + "img_attn.qkv": [BLOCK + f"attn.to_{x}" for x in "qkv"],
    DOUBLE + "txt_attn.qkv": [BLOCK + f"attn.add_{x}_proj" for x in "qkv"],
    DOUBLE + "img_attn.proj": [BLOCK + "attn.to_out.0"],
    DOUBLE + "txt_attn.proj": [BLOCK + "attn.to_add_out"],
    DOUBLE + "img_mlp.0": [BLOCK + "ff.net.0.proj"],
    DOUBLE + "txt_mlp.2": [BLOCK + "ff_context.net.2"],
    DOUBLE + "img_mod.lin": [BLOCK + "norm1.linear"],
    DOUBLE + "txt_mod.lin": [BLOCK + "norm1_context.linear"],
    SINGLE + "linear1": [f"single_{x}" for x in (f"transformer_blocks.37.attn.to_{c}" for c in "qkv")]
    + ["single_transformer_blocks.37.proj_mlp"],
    SINGLE + "linear2": ["single_transformer_blocks.37.proj_out"],
    SINGLE + "modulation.lin": ["single_transformer_blocks.37.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
JOINT, OURS = "joint_blocks.23.", "transformer_blocks.23."
SD3 = {
    JOINT + "x_block.attn.qkv": [OURS + f"attn.to_{x}" for x in "qkv"],
    JOINT + "x_block.attn2.qkv": [OURS + f"attn2.to_{x}" for x in "qkv"],
    JOINT + "context_block.attn.qkv": [OURS + f"attn.add_{x}_proj" for x in "qkv"],
    JOINT + "x_block.attn.proj": [OURS + "attn.to_out.0"],
    JOINT + "context_block.attn.proj": [OURS + "attn.to_add_out"],
    JOINT + "x_block.attn.ln_q": [OURS + "attn.norm_q"],
    JOINT + "x_block.attn2.ln_k": [OURS + "attn2.norm_k"],
    JOINT + "context_block.attn.ln_k": [OURS + "attn.norm_added_k"],
    JOINT + "x_block.mlp.fc1": [OURS + "ff.net.0.proj"],
    JOINT + "context_block.mlp.fc2": [OURS + "ff_context.net.2"],
    JOINT + "x_block.adaLN_modulation.1": [OURS + "norm1.linear"],
    JOINT + "context_block.adaLN_modulation.1": [OURS + "norm1_context.linear"],
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "unet": names.unet,
    "sgm": names.unet_sgm,
    "clip": names.clip,
    "t5": names.t5,
    "flux": names.flux,
    "sd3": names.sd3,
    "transformer": names.transformer,
}


@pytest.mark.parametrize("table", TABLES)
def test_underscored_names_are_unique(table: str) -> None:
    dotted = list(TABLES[table]())
    assert len({name.replace(".", "_") for name in dotted}) == len(dotted)


@pytest.mark.parametrize(("ours", "theirs"), SGM)
def test_the_unet_s_names_are_told_both_ways(ours: str, theirs: str) -> None:
    assert names.unet_sgm()[theirs] == ours
    assert names.sgm_of_unet(shallow_first=False)[ours] == theirs
    assert names.sgm_of_unet(shallow_first=True)[ours] == theirs


def test_the_first_upsampler_stands_behind_an_attention_in_sdxl_alone() -> None:
    ours = "up_blocks.0.upsamplers.0.conv"
    assert names.sgm_of_unet(shallow_first=False)[ours] == "output_blocks.2.2.conv"
    assert names.sgm_of_unet(shallow_first=True)[ours] == "output_blocks.2.1.conv"
    assert {names.unet_sgm()[f"output_blocks.2.{n}.conv"] for n in (1, 2)} == {ours}


@pytest.mark.parametrize("shallow_first", [False, True])
def test_every_name_of_the_unet_has_a_way_back(*, shallow_first: bool) -> None:
    inverse = names.sgm_of_unet(shallow_first=shallow_first)
    assert set(inverse) == set(names.unet())
    assert all(names.unet_sgm()[theirs] == ours for ours, theirs in inverse.items())


def test_no_block_is_the_beginning_of_another() -> None:
    table = {theirs.replace(".", "_"): ours for theirs, ours in names.unet_sgm().items()}
    for first, ours in table.items():
        if match := re.match(r"input_blocks_(\d+)_", first):
            number = int(match[1])
            expected = "conv_in" if number == 0 else f"down_blocks.{(number - 1) // 3}."
            assert ours.startswith(expected), first
    assert table["input_blocks_1_0_in_layers_2"] == "down_blocks.0.resnets.0.conv1"
    assert table["input_blocks_10_0_in_layers_2"] == "down_blocks.3.resnets.0.conv1"
    assert (
        table["input_blocks_1_1_transformer_blocks_1_attn1_to_q"]
        != table["input_blocks_11_1_transformer_blocks_1_attn1_to_q"]
    )


@pytest.mark.parametrize(("table", "known"), [(names.flux, FLUX), (names.sd3, SD3)])
def test_transformers_names_are_told_both_ways(
    table: Callable[[], Mapping[str, Rule]], known: dict[str, list[str]]
) -> None:
    for theirs, ours in known.items():
        assert list(table()[theirs].parts) == ours
        found = [module for module, fusion in table().items() if set(ours) & set(fusion.parts)]
        assert found == [theirs]


def test_the_rows_of_fused_modules_are_shared_as_they_are_cut() -> None:
    flux, sd3 = names.flux(), names.sd3()
    assert flux["double_blocks.0.img_attn.qkv"].shares == (1, 1, 1)
    assert flux["single_blocks.0.linear1"].shares == (1, 1, 1, 4)
    assert sd3["joint_blocks.0.context_block.attn.qkv"].shares == (1, 1, 1)
    assert all(len(fusion.parts) == len(fusion.shares) for table in (flux, sd3) for fusion in table.values())


def test_only_the_last_norm_has_its_halves_swapped() -> None:
    last = "final_layer.adaLN_modulation.1"
    assert [module for module, fusion in names.flux().items() if fusion.swapped] == [last]
    assert [module for module, fusion in names.sd3().items() if fusion.swapped] == [last]


def test_kernels_are_those_of_the_networks() -> None:
    assert names.kernel_of("unet.down_blocks.0.resnets.0.conv1", "sd1") == (3, 3)
    assert names.kernel_of("unet.down_blocks.1.resnets.0.conv_shortcut", "sdxl") == (1, 1)
    assert names.kernel_of("unet.down_blocks.0.attentions.0.proj_in", "sd1") == (1, 1)
    assert names.kernel_of("unet.down_blocks.1.attentions.0.proj_in", "sdxl") is None
    assert names.kernel_of(f"unet.down_blocks.0.attentions.0.{ATTENTION}", "sd1") is None
    assert names.kernel_of("te1.text_model.encoder.layers.0.mlp.fc1", "sd1") is None


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that have weights of their own."""
    return {name: module for name, module in network.named_modules() if dict(module.named_parameters(recurse=False))}


def unet_of(family: str) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    plain, cross = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
    levels: dict[str, tuple[Any, ...]] = {
        "sd1": (cross, cross, cross, plain),
        "sdxl": (plain, cross, cross),
        "sdxl-refiner": (plain, cross, cross, plain),
    }
    options: dict[str, dict[str, Any]] = {
        "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
        "sdxl": {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), **added}
        | {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816},
        "sdxl-refiner": {"block_out_channels": (384, 768, 1536, 1536), "transformer_layers_per_block": 4, **added}
        | {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560},
    }
    down, up = (tuple(level[side] for level in levels[family]) for side in (0, 1))
    with torch.device("meta"):
        made: torch.nn.Module = UNet2DConditionModel(down_block_types=down, up_block_types=up[::-1], **options[family])
    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner"])
def test_the_table_holds_every_module_of_diffusers_unet(family: str) -> None:
    there = trained(unet_of(family))
    assert set(there) <= set(names.unet())
    for name, module in there.items():
        kernel = tuple(module.kernel_size) if isinstance(module, torch.nn.Conv2d) else None
        assert names.kernel_of(f"unet.{name}", family) == kernel, name


def test_the_tables_hold_every_module_of_diffusers_flux() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    parts = {part for fusion in names.flux().values() for part in fusion.parts}
    assert set(trained(network)) == parts
    for fusion in names.flux().values():
        rows = [network.get_submodule(part).weight.shape[0] for part in fusion.parts]
        assert [row * fusion.shares[0] // rows[0] for row in rows] == list(fusion.shares)


@pytest.mark.parametrize(("depth", "dual"), [(24, 13), (38, 0)])
def test_the_tables_hold_every_module_of_diffusers_sd3(depth: int, dual: int) -> None:
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(num_layers=depth, dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm")
    parts = {part for fusion in names.sd3().values() for part in fusion.parts}
    assert set(trained(network)) <= parts


def test_the_table_holds_every_module_of_transformers_clip() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120)
    with torch.device("meta"):
        network = CLIPTextModelWithProjection(config)
    assert set(trained(network)) == set(names.clip())


def test_the_table_holds_every_module_of_transformers_t5() -> None:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        network = T5EncoderModel(T5Config(num_layers=24, d_model=64, d_ff=64, feed_forward_proj="gated-gelu"))
    assert set(trained(network)) <= set(names.t5())
