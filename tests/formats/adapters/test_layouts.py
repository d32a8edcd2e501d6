"""Every layout of the atlas is told by its names, and its modules and family are read from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdformats.adapters.layouts import LAYOUTS
from sdformats.adapters.records import Full, LoKr, LoRA
from tests.formats.adapters import samples
from tests.formats.adapters.samples import PEFT, WIDTHS, noise, pair, pairs, read, save

if TYPE_CHECKING:
    from pathlib import Path

    from tests.formats.adapters.samples import Tensors

TB = "transformer_blocks_0"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = "text_model.encoder.layers.0"
FLAT_LAYER = LAYER.replace(".", "_")
SD1, SDXL = {"inner": WIDTHS["sd1"]}, {"inner": WIDTHS["sdxl"]}
LINEAR = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
OLD = ("down.weight", "up.weight")
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
DOUBLE, SINGLE = "unet.transformer_blocks.0.", "unet.single_transformer_blocks.0."


def processors(start: str) -> Tensors:
    found = pair(f"{start}{ATTENTION}.attn1.processor.to_q_lora", ends=OLD)
    found |= pair(f"{start}{ATTENTION}.attn2.processor.to_k_lora", ends=OLD, **SD1)
    return found | pair(f"{start}{ATTENTION}.attn1.processor.to_out_lora", ends=OLD)


def three(prefix: str, names: str, **options: Any) -> Tensors:
    return {k: v for one in names.split() for k, v in pair(prefix + one, **options).items()}


SGM = "lora_unet_input_blocks_4_1_"
ROWS: dict[str, tuple[str, str | None, Tensors, list[str]]] = {
    "2": (
        "cloneofsimo",
        "sd1",
        {f"unet:{n}:{x}": t for n, both in enumerate(samples.numbered()) for x, t in zip(("up", "down"), both, strict=True)},
        [UNET + "attn1.to_q", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"],
    ),
    "3": (
        "kohya",
        "sd1",
        pair(f"lora_unet_down_blocks_0_attentions_0_{TB}_attn1_to_q", alpha=1)
        | pair(f"lora_unet_down_blocks_0_attentions_0_{TB}_attn1_to_out_0")
        | pair(f"lora_unet_down_blocks_0_attentions_0_{TB}_attn2_to_k", **SD1)
        | pair("lora_unet_down_blocks_0_resnets_0_conv1", kernel=(3, 3))
        | pair("lora_unet_down_blocks_0_downsamplers_0_conv", kernel=(3, 3))
        | three(f"lora_te_{FLAT_LAYER}_", "self_attn_q_proj mlp_fc1", inner=768),
        [UNET + "attn1.to_out.0", "unet.down_blocks.0.downsamplers.0.conv", f"te1.{LAYER}.self_attn.q_proj"],
    ),
    "4": (
        "kohya-sgm",
        "sdxl",
        pair(f"{SGM}{TB}_attn2_to_k", alpha=1, **SDXL)
        | three("lora_unet_", "middle_block_1_proj_in output_blocks_2_1_proj_out label_emb_0_2")
        | three("lora_unet_", "output_blocks_3_0_in_layers_2 input_blocks_3_0_op output_blocks_2_2_conv", kernel=(3, 3))
        | three("lora_", f"te1_{FLAT_LAYER}_mlp_fc1 te2_text_model_encoder_layers_31_self_attn_v_proj te2_text_projection"),
        [
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "unet.up_blocks.0.upsamplers.0.conv",
            "unet.add_embedding.linear_2",
            "te2.text_model.encoder.layers.31.self_attn.v_proj",
            "te2.text_projection",
        ],
    ),
    "5": (
        "lycoris",
        "sdxl",
        {f"{SGM}{TB}_attn2_to_k.hada_{x}": noise(*s) for x, s in zip(
            ("w1_a", "w1_b", "w2_a", "w2_b"), ((4, 2), (2, 2048), (4, 2), (2, 2048)), strict=True)}
        | {f"{SGM}proj_in.lokr_w1": noise(2, 2), f"{SGM}proj_in.lokr_w2": noise(3, 3)}
        | {f"{SGM}norm.w_norm": noise(4), f"{SGM}norm.b_norm": noise(4)}
        | {"bundle_emb.word.string_to_param.*": noise(2, 8)},
        ["unet.down_blocks.1.attentions.0.norm", "unet.down_blocks.1.attentions.0.proj_in"],
    ),
    "6": (
        "lycoris-wrapper",
        "flux",
        {f"lycoris_single_{TB}_attn_to_q.lokr_w1": noise(2, 2), f"lycoris_single_{TB}_attn_to_q.lokr_w2": noise(3, 3)},
        [SINGLE + "attn.to_q"],
    ),
    "7": (
        "kohya-oft",
        None,
        {f"oft_unet_input_blocks_1_1_{TB}_attn1_to_out_0.oft_blocks": noise(2, 2, 2),
         f"oft_unet_input_blocks_1_1_{TB}_attn1_to_out_0.alpha": torch.tensor(0.001)},
        [UNET + "attn1.to_out.0"],
    ),
    "8": ("attn-procs", "sd1", processors(""), [UNET + "attn1.to_q", UNET + "attn1.to_out.0"]),
    "9": (
        "diffusers-old",
        "sd1",
        processors("unet.") | pair(f"text_encoder.{LAYER}.self_attn.to_k_lora", ends=OLD),
        [UNET + "attn1.to_out.0", f"te1.{LAYER}.self_attn.k_proj"],
    ),
    "9, later": (
        "diffusers-old",
        "sd1",
        processors("unet.") | pair(f"text_encoder.{LAYER}.self_attn.out_proj", ends=LINEAR),
        [UNET + "attn1.to_out.0", f"te1.{LAYER}.self_attn.out_proj"],
    ),
    "10": (
        "diffusers",
        "sdxl",
        pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", ends=PEFT, **SDXL)
        | pair("unet.down_blocks.0.resnets.0.conv1", ends=PEFT, kernel=(3, 3))
        | pair(f"text_encoder_2.{LAYER}.mlp.fc1", ends=LINEAR),
        ["unet.down_blocks.0.resnets.0.conv1", f"te2.{LAYER}.mlp.fc1"],
    ),
    "10, lora.down": (
        "diffusers",
        "sd1",
        pair(f"{UNET}attn2.to_k", ends=("lora.down.weight", "lora.up.weight"), **SD1)
        | pair("text_encoder.encoder.layers.0.self_attn.q_proj", ends=LINEAR),
        [UNET + "attn2.to_k", f"te1.{LAYER}.self_attn.q_proj"],
    ),
    "12": (
        "comfy",
        "sd1",
        pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", alpha=4)
        | pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k", ends=PEFT, **SD1)
        | {"diffusion_model.out.0.diff": noise(4), "diffusion_model.out.0.diff_b": noise(4)}
        | pair(f"text_encoders.clip_l.transformer.{LAYER}.mlp.fc1"),
        [UNET + "attn1.to_q", "unet.conv_norm_out", f"te1.{LAYER}.mlp.fc1"],
    ),
    "12, Flux": (
        "comfy",
        "flux",
        pair("diffusion_model.double_blocks.0.img_attn.qkv", ends=PEFT, out=12)
        | pair("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        [DOUBLE + "attn.to_q", DOUBLE + "attn.to_v", "te3.encoder.block.0.layer.0.SelfAttention.q"],
    ),
    "12, SD3": (
        "comfy",
        "sd3",
        pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", ends=PEFT, out=12)
        | pair("diffusion_model.final_layer.linear", ends=PEFT),
        [DOUBLE + "attn.to_q", "unet.proj_out"],
    ),
    "13": (
        "flux-kohya",
        "flux",
        pair("lora_unet_double_blocks_0_img_attn_qkv", out=12, alpha=1)
        | pair("lora_unet_single_blocks_0_linear1", out=28, alpha=1)
        | three("lora_", f"te1_{FLAT_LAYER}_mlp_fc1 te3_encoder_block_0_layer_0_SelfAttention_q"),
        [DOUBLE + "attn.to_k", SINGLE + "proj_mlp", f"te1.{LAYER}.mlp.fc1", "te3.encoder.block.0.layer.0.SelfAttention.q"],
    ),
    "14": (
        "flux-diffusers",
        "flux",
        three("transformer.", "transformer_blocks.0.attn.to_q single_transformer_blocks.0.proj_mlp", ends=PEFT),
        [DOUBLE + "attn.to_q", SINGLE + "proj_mlp"],
    ),
    "14, by its width": (
        "flux-diffusers",
        "flux",
        pair("transformer.transformer_blocks.0.attn.to_q", ends=PEFT, inner=3072),
        [DOUBLE + "attn.to_q"],
    ),
    "15": (
        "onetrainer",
        "flux",
        three("lora_", f"transformer_single_{TB}_attn_to_q te1_{FLAT_LAYER}_mlp_fc1", alpha=1)
        | pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q"),
        [SINGLE + "attn.to_q", f"te1.{LAYER}.mlp.fc1", "te3.encoder.block.0.layer.0.SelfAttention.q"],
    ),
    "15, SD3": (
        "onetrainer",
        "sd3",
        pair(f"lora_transformer_{TB}_attn_to_q", inner=1536)
        | three("lora_", f"te2_{FLAT_LAYER}_mlp_fc1 te3_encoder_block_0_layer_0_SelfAttention_q"),
        [DOUBLE + "attn.to_q", f"te2.{LAYER}.mlp.fc1", "te3.encoder.block.0.layer.0.SelfAttention.q"],
    ),
    "16": (
        "xlabs",
        "flux",
        three("double_blocks.0.processor.", "qkv_lora1 qkv_lora2", ends=OLD, out=12)
        | three("", "double_blocks.0.processor.proj_lora1 single_blocks.0.processor.proj_lora", ends=OLD),
        [DOUBLE + "attn.to_q", DOUBLE + "attn.add_v_proj", DOUBLE + "attn.to_out.0"],
    ),
    "17": (
        "sd3-kohya",
        "sd3",
        pair("lora_unet_joint_blocks_0_x_block_attn_qkv", out=12, alpha=1)
        | three("lora_", f"te1_{FLAT_LAYER}_mlp_fc1 te2_{FLAT_LAYER}_mlp_fc1 te3_encoder_block_0_layer_0_SelfAttention_q"),
        [DOUBLE + "attn.to_v", f"te2.{LAYER}.mlp.fc1", "te3.encoder.block.0.layer.0.SelfAttention.q"],
    ),
    "17, diffusers": (
        "sd3-diffusers",
        "sd3",
        pair("transformer.transformer_blocks.0.attn.add_q_proj", ends=PEFT)
        | pair("transformer.transformer_blocks.0.attn.to_q", ends=PEFT, inner=1536),
        [DOUBLE + "attn.add_q_proj"],
    ),
    "18": (
        "hcp",
        "sd1",
        pair(f"{ATTENTION}.attn2.to_k", ends=("___.layer.W_down", "___.layer.W_up"), **SD1)
        | {f"{ATTENTION}.attn2.to_k.___.alpha": torch.tensor(0.5)},
        [UNET + "attn2.to_k"],
    ),
    "18, older text encoders": (
        "hcp",
        "sdxl",
        pair(f"clip_bigG.{LAYER}.mlp.fc1", ends=("___.layer.lora_down.weight", "___.layer.lora_up.weight")),
        [f"te2.{LAYER}.mlp.fc1"],
    ),
    "19": (
        "control-lora",
        "sdxl",
        {"lora_controlnet": torch.zeros(0)}
        | pair("input_blocks.4.1.transformer_blocks.1.attn1.to_q", ends=("down", "up"))
        | {"zero_convs.0.0.weight": noise(4, 4, 1, 1), "zero_convs.0.0.bias": noise(4)},
        ["controlnet.input_blocks.4.1.transformer_blocks.1.attn1.to_q", "controlnet.zero_convs.0.0"],
    ),
    "20": (
        "bfl-control",
        "flux",
        pair("img_in", ends=PEFT)
        | {"img_in.lora_B.bias": noise(4), "double_blocks.0.img_attn.norm.key_norm.scale": noise(4)},
        ["unet.x_embedder", DOUBLE + "attn.norm_k"],
    ),
    "21": (
        "custom-diffusion",
        "sd1",
        {f"unet.{ATTENTION}.attn2.to_k.weight": noise(4, 768), "modifier_token.<new1>": noise(768)},
        [UNET + "attn2.to_k"],
    ),
    "21, compressed": (
        "custom-diffusion",
        "sd1",
        {f"unet.{ATTENTION}.attn2.to_v.weight.{end}": noise(*size) for end, size in (("u", (4, 2)), ("v", (2, 768)))},
        [UNET + "attn2.to_v"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_atlas_is_recognised(row: str, tmp_path: Path) -> None:
    name, family, tensors, some = ROWS[row]
    adapter, layout = read(save(tmp_path / "a.safetensors", tensors))
    assert (layout.name, adapter.family) == (name, family)
    assert set(some) <= set(adapter.modules)
    assert adapter.scaled


def test_a_pickled_list_is_cloneofsimo_s(tmp_path: Path) -> None:
    adapter, layout = read(samples.save_list(tmp_path / "a.pt", samples.numbered()))
    assert (layout.name, adapter.family, len(adapter.modules)) == ("cloneofsimo-list", "sd1", 144)
    assert all(record.scale == 1 for record in adapter.modules.values())


def test_a_pickled_list_of_a_text_encoder_is_told_by_its_shapes(tmp_path: Path) -> None:
    items = [(noise(768, 1), noise(1, 768))] * 48
    adapter, _ = read(samples.save_list(tmp_path / "a.text_encoder.pt", items))
    assert list(adapter.modules)[:4] == [f"te1.{LAYER}.self_attn.{x}_proj" for x in ("k", "v", "q", "out")]
    assert adapter.family == "sd1"


@pytest.mark.parametrize("place", [4, 8])
def test_geglu_is_found_where_its_shape_is(place: int, tmp_path: Path) -> None:
    items = samples.numbered(geglu=place)
    tensors = {f"unet:{n}:{x}": t for n, both in enumerate(items) for x, t in zip(("up", "down"), both, strict=True)}
    adapter, _ = read(save(tmp_path / "a.safetensors", tensors))
    geglu = [record for path, record in adapter.modules.items() if path.endswith("ff.net.0.proj")]
    assert len(geglu) == 16
    assert all(record.height == 32 for record in geglu)


def test_words_beside_numbered_factors_are_embeddings(tmp_path: Path) -> None:
    adapter, _ = read(save(tmp_path / "a.safetensors", ROWS["2"][2] | {"<s1>": noise(8)}, {"<s1>": "<embed>"}))
    assert list(adapter.embeddings) == ["<s1>"]


def test_a_peft_folder_is_recognised(tmp_path: Path) -> None:
    tensors = pair(f"base_model.model.{ATTENTION}.attn2.to_k", ends=PEFT, **SD1)
    adapter, layout = read(samples.save_peft(tmp_path / "a", tensors))
    assert (layout.name, adapter.family) == ("peft", "sd1")
    assert list(adapter.modules) == [UNET + "attn2.to_k"]


@pytest.mark.parametrize("row", ["13", "3", "4", "17"])
def test_a_pickle_is_read_as_a_safetensors_file_is(row: str, tmp_path: Path) -> None:
    name, family, tensors, _ = ROWS[row]
    torch.save(tensors, tmp_path / "a.pt")
    adapter, layout = read(tmp_path / "a.pt")
    assert (layout.name, adapter.family) == (name, family)


def test_every_layout_of_the_atlas_is_tried_here() -> None:
    tried = {name for name, *_ in ROWS.values()} | {"cloneofsimo-list", "peft"}
    assert tried == {layout.name for layout in LAYOUTS}


def test_what_lycoris_writes_is_read_as_its_algorithms(tmp_path: Path) -> None:
    adapter, _ = read(save(tmp_path / "a.safetensors", ROWS["5"][2]))
    assert adapter.algorithms == ("loha", "lokr", "norm")
    assert list(adapter.embeddings) == ["word"]
    whole = adapter.modules["unet.down_blocks.1.attentions.0.proj_in"]
    assert isinstance(whole, LoKr)
    assert (whole.height, whole.columns) == (6, 6)


def test_a_norm_s_scale_in_a_control_lora_of_flux_replaces_it(tmp_path: Path) -> None:
    adapter, _ = read(save(tmp_path / "a.safetensors", ROWS["20"][2]))
    norm, first = adapter.modules[DOUBLE + "attn.norm_k"], adapter.modules["unet.x_embedder"]
    assert isinstance(norm, Full)
    assert norm.replaces
    assert isinstance(first, LoRA)
    assert first.bias is not None


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (f"lora_te_{FLAT_LAYER}_mlp_fc1", "kohya"),
        (f"lora_te1_{FLAT_LAYER}_mlp_fc1", "kohya-sgm"),
        (f"lora_te2_{FLAT_LAYER}_mlp_fc1", "kohya-sgm"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "flux-kohya"),
        (f"text_encoder.{LAYER}.mlp.fc1", "diffusers"),
    ],
)
def test_text_encoders_alone_are_recognised(module: str, layout: str, tmp_path: Path) -> None:
    ends = PEFT if layout == "diffusers" else samples.KOHYA
    assert read(save(tmp_path / "a.safetensors", pairs(module, ends=ends)))[1].name == layout


def test_factors_of_diffusers_without_weight_in_their_names_are_recognised(tmp_path: Path) -> None:
    tensors = pair(f"{UNET}attn2.to_k", ends=("lora_A", "lora_B"), **SD1)
    assert read(save(tmp_path / "a.safetensors", tensors))[1].name == "diffusers"


@pytest.mark.parametrize("base", ["sd_v1", "sdxl_base_v1-0", "sd_v2_768"])
def test_what_the_trainer_wrote_tells_the_family_where_nothing_else_does(base: str, tmp_path: Path) -> None:
    tensors = pair("lora_unet_down_blocks_0_resnets_0_conv1", kernel=(3, 3))
    adapter, _ = read(save(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": base}))
    assert adapter.family == {"sd_v1": "sd1", "sd_v2_768": "sd2"}.get(base, "sdxl")
