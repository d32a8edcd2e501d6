"""Files that are no model of their own: each dialect's names as its tool writes them."""

from __future__ import annotations

import pytest

from sdformats.errors import FormatError
from sdformats.kind import Kind, Looks, Marked
from sdformats.kinds import KINDS, readings_of
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
    found = detect({name: spec(*shape), "another.alpha": spec()})
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
def test_a_bare_vector_has_two_readings(shape: tuple[int, ...]) -> None:
    found = detect({"": spec(*shape)})
    assert (found.kind, found.family, found.spelling) == ("ambiguous", "sd1", None)
    assert {reading.kind for reading in found.readings} == {"embedding", "aesthetic"}
    assert "textual-inversion embedding or an aesthetic embedding" in found.warnings[0]
    assert "--as embedding|aesthetic" in found.warnings[0]


def test_two_readings_of_different_families() -> None:
    found = detect({"": spec(1280)})
    assert (found.kind, found.family) == ("ambiguous", None)
    assert detect({"": spec(1280)}, family="sdxl").family == "sdxl"
    assert detect({"": spec(1280)}, kind="aesthetic").family == "sdxl"


@pytest.mark.parametrize("kind", ["embedding", "aesthetic"])
def test_asking_for_a_reading_decides(kind: str) -> None:
    found = detect({"": spec(1, 768)}, kind=kind)
    assert (found.kind, found.family, found.spelling, found.warnings) == (kind, "sd1", "bare", ())


def test_several_bare_vectors_are_no_mean() -> None:
    assert detect({"": spec(2, 768)}).kind == "embedding"


def test_asking_for_what_it_is_not() -> None:
    with pytest.raises(FormatError, match=r"cannot be read as aesthetic \(expected embedding\)"):
        detect({"emb_params": spec(1, 768)}, kind="aesthetic")
    with pytest.raises(FormatError, match="cannot be read as embedding"):
        detect({"conv.weight": spec(4, 4, 3, 3)}, kind="embedding")


OTHERS: dict[str, tuple[dict[str, Spec], str, str, str | None]] = {
    "custom diffusion, first": (
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": spec(320, 768),
            "embed": spec(1, 768),
        },
        "custom-diffusion",
        "original",
        "sd1",
    ),
    "custom diffusion": (
        {f"unet.{BLOCK}to_k.weight": spec(320, 1024), "modifier_token.<new1>": spec(1024)},
        "custom-diffusion",
        "delta",
        "sd2",
    ),
    "custom diffusion sdxl": (
        {f"unet.{BLOCK}to_v.weight": spec(320, 2048), "modifier_token.<new1>.0": spec(768)},
        "custom-diffusion",
        "delta",
        "sdxl",
    ),
    "custom diffusion, compressed": (
        {f"unet.{BLOCK}to_k.weight.{half}": spec(4, 4) for half in "uv"},
        "custom-diffusion",
        "compressed",
        None,
    ),
    "custom diffusion, diffusers": (
        {f"{BLOCK}processor.to_k_custom_diffusion.weight": spec(320, 768)},
        "custom-diffusion",
        "diffusers",
        "sd1",
    ),
    "null text": ({"": spec(50, 1, 77, 768)}, "null-text", "bare", "sd1"),
    "null text list": ({f"{i}": spec(1, 77, 1024) for i in range(50)}, "null-text", "list", "sd2"),
    "clip inversion": ({"clip_image": spec(2, 768)}, "clip-inversion", "named", None),
    "novelai": ({"768.0.linear1.weight": spec(4, 4)}, "hypernetwork", "novelai", "sd1"),
    "optimizer state": (
        {"optimizer_state_dict.state.0.exp_avg": spec(2, 768)},
        "optimizer-state",
        "a1111",
        None,
    ),
    "inpaint head": ({"head": spec(320, 5, 3, 3)}, "inpaint-head", "fooocus", "sdxl"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_small_files(name: str) -> None:
    specs, kind, layout, family = OTHERS[name]
    found = detect(specs)
    assert (found.kind, found.spelling, found.family) == (kind, layout, family)
    assert detect({**specs, "conv.weight": spec(4, 4, 3, 3)}).kind != kind


def test_a_whole_unet_is_no_delta() -> None:
    names = [f"unet.{BLOCK}{name}.weight" for name in ("to_k", "to_v", "to_q")]
    names.append("unet.conv_in.weight")
    assert detect(dict.fromkeys(names, spec(320, 768))).kind != "custom-diffusion"


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert len({layout.name for layout in kind.layouts}) == len(kind.layouts)


def test_two_layouts_of_one_kind_that_fit_equally_well_are_an_error() -> None:
    kind = Kind(name="k", title="a thing", layouts=(Marked(name="a", marks=("x",)), Marked(name="b", marks=("x",))))
    with pytest.raises(FormatError, match="is a thing in the layout a or b"):
        kind.read(Looks({"x": spec(1)}, {}))


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
    assert readings_of(specs, {}) == ()
