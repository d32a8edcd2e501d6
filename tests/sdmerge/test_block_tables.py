"""The tables against the tensors of whole models, and the words that name blocks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.shapes import SD15, SDXL
from sdformats.layout import FAMILIES
from sdmerge.block_tables import Table, canonical, shortened, table
from sdmerge.errors import FamilyError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

REAL = Path(__file__).parents[3] / "shared" / "real"
UNET = "model.diffusion_model."


def counts(found: Table, names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(map(found.block_of, names)))


def expected(found: Table, *, without: Iterable[str] = ()) -> dict[str, int | None]:
    return {row.name: row.tensors for row in found.rows if row.name not in without}


@pytest.mark.parametrize(("family", "model"), [("sd1", SD15), ("sdxl", SDXL)])
def test_every_tensor_of_a_single_file_is_counted_once(family: str, model: Any) -> None:
    assert counts(table(family), model.specs()) == expected(table(family))


@pytest.mark.parametrize(("family", "model"), [("sd1", SD15), ("sdxl", SDXL)])
def test_a_network_in_a_file_of_its_own_has_the_same_blocks(family: str, model: Any) -> None:
    found = table(family)
    for name in model.specs():
        if name.startswith(UNET):
            bare = name.removeprefix(UNET)
            assert found.block_of(bare) == found.block_of("diffusion_model." + bare) == found.block_of(name)
            assert found.component_of(bare) == "unet"


def unet(depths: list[int], *, pooled: bool) -> Iterable[str]:
    """Name the tensors of a narrow UNet as diffusers does; depth 0 is a level without attention."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    attending = ["CrossAttn" if depth else "" for depth in depths]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16,
    }
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            block_out_channels=[32 * width for width in (1, 2, 4, 4)][: len(depths)],
            down_block_types=[f"{kind}DownBlock2D" for kind in attending],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attending)],
            transformer_layers_per_block=[depth or 1 for depth in depths[:-1]] + [depths[-1] or depths[-2]],
            cross_attention_dim=8,
            attention_head_dim=8,
            **(added if pooled else {}),
        )
    names: Iterable[str] = model.state_dict().keys()
    return names


@pytest.mark.parametrize(
    ("family", "depths", "pooled"),
    [("sd1", [1, 1, 1, 0], False), ("sdxl", [0, 2, 10], True), ("sdxl-refiner", [0, 4, 4, 0], True)],
)
def test_diffusers_names_fall_into_the_same_blocks(family: str, depths: list[int], pooled: bool) -> None:
    found, names = table(family), list(unet(depths, pooled=pooled))
    wanted = expected(found, without=("BASE", "VAE"))
    assert counts(found, names) == wanted
    assert counts(found, ["unet." + name for name in names]) == wanted


def test_a_flux_of_diffusers_has_all_blocks_and_nothing_beside() -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
    found = counts(table("flux"), ["transformer." + name for name in model.state_dict()])
    assert found.keys() == set(table("flux").blocks) - {"CLIP", "T5"}
    assert found["D18"] == found["D00"] == 32
    assert found["S37"] == found["S00"] == 14
    assert (found["IN"], found["OUT"]) == (16, 4)


def test_an_sd3_of_diffusers_has_as_many_blocks_as_it_is_deep() -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch

    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(
            sample_size=8,
            num_layers=24,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
    found, names = table("sd3", 24), list(model.state_dict())
    assert counts(found, names).keys() == set(found.blocks)
    assert {found.component_of(name) for name in names} == {"unet"}
    assert counts(found, ["transformer." + name for name in names]) == counts(found, names)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real files here")
def test_a_real_unet_of_sdxl() -> None:
    names = json.loads((REAL / "124_keydump-juggernautXLv9-unet.json").read_text()).keys()
    assert counts(table("sdxl"), names) == expected(table("sdxl"), without=("BASE", "VAE"))


PLACES = [
    ("sd1", UNET + "time_embed.0.weight", "IN00", "unet"),
    ("sd1", "unet.time_embedding.linear_1.weight", "IN00", "unet"),
    ("sdxl", UNET + "label_emb.0.0.weight", "IN00", "unet"),
    ("sdxl", "unet.add_embedding.linear_1.weight", "IN00", "unet"),
    ("sd1", UNET + "out.2.bias", "OUT11", "unet"),
    ("sdxl", UNET + "out.2.bias", "OUT08", "unet"),
    ("sd1", UNET + "input_blocks.1.0.in_layers.2.weight", "IN01", "unet"),
    ("sd1", UNET + "input_blocks.10.0.in_layers.2.weight", "IN10", "unet"),
    ("sd1", UNET + "input_blocks.100.0.in_layers.2.weight", "BASE", "unet"),
    ("sd1", "cond_stage_model.transformer.text_model.final_layer_norm.weight", "BASE", "te"),
    ("sdxl", "conditioner.embedders.1.model.ln_final.weight", "BASE", "te"),
    ("sdxl", "text_encoder_2.text_projection.weight", "BASE", "te"),
    ("sd2", "transformer.resblocks.0.attn.out_proj.weight", "BASE", "te"),
    ("sd1", "text_model.embeddings.token_embedding.weight", "BASE", "te"),
    ("sd1", "first_stage_model.decoder.conv_in.weight", "VAE", "vae"),
    ("sdxl", "vae.decoder.conv_in.weight", "VAE", "vae"),
    ("sdxl", "decoder.mid.attn_1.q.weight", "VAE", "vae"),
    ("flux", "vae.decoder.conv_in.weight", "VAE", "vae"),
    ("flux", "text_encoders.t5xxl.transformer.shared.weight", "T5", "te"),
    ("flux", "encoder.block.0.layer.0.SelfAttention.q.weight", "T5", "te"),
    ("flux", "text_encoder_2.shared.weight", "T5", "te"),
    ("flux", "text_encoder.text_model.embeddings.token_embedding.weight", "CLIP", "te"),
    ("flux", UNET + "guidance_in.in_layer.weight", "IN", "unet"),
    ("flux", "double_blocks.18.img_attn.qkv.weight", "D18", "unet"),
    ("flux", "single_transformer_blocks.3.proj_mlp.weight", "S03", "unet"),
    ("flux", "final_layer.linear.weight", "OUT", "unet"),
    ("sd3", "model.diffusion_model.joint_blocks.37.x_block.attn.qkv.weight", "JOINT37", "unet"),
    ("sd3", "pos_embed", "BASE", "unet"),
    ("sd3", "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight", "BASE", "te"),
    ("sd1", "safety_checker.concept_embeds", "BASE", "other"),
    ("sd1", "model_ema.diffusion_modelinput_blocks00weight", "BASE", "other"),
    ("sd1", "alphas_cumprod", "BASE", "other"),
    ("sd1", "", "BASE", "other"),
]


@pytest.mark.parametrize(("family", "name", "block", "component"), PLACES)
def test_places(family: str, name: str, block: str, component: str) -> None:
    assert (table(family).block_of(name), table(family).component_of(name)) == (block, component)


def test_the_numbers_of_blocks_are_those_of_the_lists_that_circulate() -> None:
    assert {name: len(table(name).blocks) for name in FAMILIES} == {
        "sd1": 26,
        "sd2": 26,
        "sdxl": 20,
        "sdxl-refiner": 26,
        "sd3": 39,
        "flux": 61,
    }
    assert shortened(table("sdxl").rows) == "BASE, IN00-IN08, M00, OUT00-OUT08, VAE"
    assert shortened(table("flux").rows) == "CLIP, T5, IN, D00-D18, S00-S37, OUT, VAE"


def test_no_beginning_of_a_name_belongs_to_two_blocks() -> None:
    for family in FAMILIES:
        for spelling in ("single_file", "diffusers"):
            starts = [start for row in table(family).rows for start in getattr(row, spelling)]
            assert len(starts) == len(set(starts))


@pytest.mark.parametrize(
    ("family", "word", "blocks"),
    [
        ("sd1", "in4", ("IN04",)),
        ("sd1", "IN004", ("IN04",)),
        ("sd1", "mid", ("M00",)),
        ("sd1", "IN10-OUT01", ("IN10", "IN11", "M00", "OUT00", "OUT01")),
        ("sd1", "IN02-IN00", ("IN00", "IN01", "IN02")),
        ("sd1", "VAE", ("VAE",)),
        ("flux", "double5-D06", ("D05", "D06")),
        ("flux", "Base", ("CLIP", "T5", "BASE")),
        ("flux", "IN", ("IN",)),
    ],
)
def test_words_for_blocks(family: str, word: str, blocks: tuple[str, ...]) -> None:
    assert table(family).expand(word) == blocks


@pytest.mark.parametrize(
    ("family", "word", "said"),
    [
        ("sdxl", "OUT9", "'OUT9' is no block of sdxl (expected BASE, IN00-IN08, M00, OUT00-OUT08, VAE)"),
        ("sd1", "OTU03", "did you mean 'OUT03'?"),
        ("sd1", "IN00-IN99", "'IN99' in 'IN00-IN99' is no block"),
        ("sd1", "IN00-", "'' in 'IN00-' is no block"),
        ("sd1", "", "'' is no block"),
    ],
)
def test_unknown_words_are_refused_with_the_nearest(family: str, word: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        table(family).expand(word)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_digits_stay_as_they_are() -> None:
    assert canonical(" in٣ ") == "IN٣"
    assert canonical("in0") == "IN00"


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(FamilyError, match="'sdx' is no family .*; did you mean 'sdxl'"):
        table("sdx")
