"""Files that are no model of their own: each dialect's names as its tool writes them."""

from __future__ import annotations

import pytest

from sdformats.kinds import kind_of
from sdformats.layout import detect
from sdformats.tensor import DType, Spec

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2."
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def spec(*shape: int) -> Spec:
    return Spec(shape, DType.F16)


ADAPTERS: dict[str, tuple[str, int | None, str | None]] = {
    "kohya sd1": (f"{FLAT}.lora_down.weight", 768, "sd1"),
    "kohya sd2": (f"{FLAT}.lora_down.weight", 1024, "sd2"),
    "kohya sdxl": (f"{SGM}.lora_down.weight", 2048, "sdxl"),
    "kohya te2": ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280, "sdxl"),
    "kohya te sd1": ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 768, "sd1"),
    "kohya te sd2": ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1024, "sd2"),
    "cloneofsimo": ("unet:0:down", None, None),
    "attn procs": (f"{BLOCK}processor.to_k_lora.down.weight", 768, "sd1"),
    "attn procs with prefix": (f"unet.{BLOCK}processor.to_k_lora.down.weight", 1024, "sd2"),
    "diffusers": (f"unet.{BLOCK}to_k.lora.down.weight", 768, "sd1"),
    "diffusers today": (f"unet.{BLOCK}to_k.lora_A.weight", 2048, "sdxl"),
    "linear layer": (
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight",
        768,
        None,
    ),
    "peft": (f"base_model.model.{BLOCK}to_k.lora_A.weight", 768, "sd1"),
    "loha": (f"{FLAT}.hada_w1_a", None, None),
    "lokr": (f"{FLAT}.lokr_w1", None, None),
    "oft": ("oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.oft_blocks", None, None),
    "dora": (f"{FLAT}.dora_scale", None, None),
    "full difference": ("diffusion_model.input_blocks.1.0.in_layers.2.diff", None, None),
    "flux kohya": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072, "flux"),
    "flux diffusers": ("transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", 3072, "flux"),
    "flux xlabs": ("double_blocks.0.processor.qkv_lora1.down.weight", 3072, "flux"),
    "sd3 kohya": ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", 1536, "sd3"),
    "sd3 diffusers": ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", 1536, "sd3"),
    "hcp": ("unet.down_blocks.0.___.layer.W_down", None, None),
    "control lora": ("lora_controlnet", None, None),
}


@pytest.mark.parametrize("dialect", ADAPTERS)
def test_adapters(dialect: str) -> None:
    name, width, family = ADAPTERS[dialect]
    shape = (4, width) if width else (4, 4)
    found = kind_of({name: spec(*shape), "another.alpha": spec()})
    assert found is not None
    assert (found.kind, found.family) == ("adapter", family)


EMBEDDINGS: dict[str, tuple[dict[str, Spec], str | None]] = {
    "a1111": ({"string_to_param.*": spec(3, 768)}, "sd1"),
    "a1111 sd2": ({"string_to_param.*": spec(3, 1024)}, "sd2"),
    "diffusers": ({"<birb-style>": spec(768)}, "sd1"),
    "safetensors": ({"emb_params": spec(8, 768)}, "sd1"),
    "sdxl": ({"clip_l": spec(2, 768), "clip_g": spec(2, 1280)}, "sdxl"),
    "one of another name": ({"my-style": spec(768)}, "sd1"),
    "an unknown width": ({"emb_params": spec(8, 48)}, None),
}


@pytest.mark.parametrize("dialect", EMBEDDINGS)
def test_embeddings(dialect: str) -> None:
    specs, family = EMBEDDINGS[dialect]
    found = detect(specs)
    assert (found.kind, found.family) == ("embedding", family)
    assert detect(specs, family="sd2").family == "sd2"


@pytest.mark.parametrize("shape", [(768,), (1, 768)])
def test_a_bare_vector_is_told_to_be_doubtful(shape: tuple[int, ...]) -> None:
    found = detect({"": spec(*shape)})
    assert (found.kind, found.family) == ("aesthetic", "sd1")
    assert "embedding" in found.warnings[0]


def test_hypernetworks() -> None:
    names = [
        f"{width}.{i}.linear.{j}.{what}"
        for width in (320, 768)
        for i in (0, 1)
        for j in (0, 1)
        for what in ("weight", "bias")
    ]
    assert detect(dict.fromkeys(names, spec(4, 4))).kind == "hypernetwork"
    assert detect({**dict.fromkeys(names, spec(4, 4)), "fc.weight": spec(4, 4)}).kind != "hypernetwork"


@pytest.mark.parametrize("name", ["control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"])
def test_controlnets(name: str) -> None:
    """Their UNet blocks must not make them a UNet."""
    specs = {name: spec(8, 3, 3, 3)}
    specs |= {f"down_blocks.{i}.attentions.0.proj_in.weight": spec(8, 8, 1, 1) for i in range(4)}
    assert detect(specs).kind == "controlnet"


def test_nothing() -> None:
    found = detect({})
    assert (found.kind, found.family) == ("other", None)
    assert found.warnings


@pytest.mark.parametrize(
    "specs",
    [
        {"conv.weight": spec(4, 4, 3, 3)},
        {"": spec(3, 3)},
        {"encoder.weight": spec(768, 768), "encoder.bias": spec(768)},
        {f"layer{i}": spec(768) for i in range(20)},
        {"ids": Spec((1, 768), DType.I64)},
    ],
)
def test_what_is_nothing_of_these(specs: dict[str, Spec]) -> None:
    assert kind_of(specs) is None
