"""Detection: every family, spelling and variant, on networks that diffusers builds and on key sets of single files."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdformats import layouts
from sdformats.errors import FormatError
from sdformats.layout import FAMILIES, Detection, component_of, detect
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Specs = dict[str, Spec]
NETWORK = "model.diffusion_model."
LEVELS = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


def spec(*shape: int) -> Spec:
    return Spec(shape, DType.F16)


def of(module: torch.nn.Module) -> Specs:
    return {name: spec(*tensor.shape) for name, tensor in module.state_dict().items()}


def under(prefix: str, specs: Mapping[str, Spec]) -> Specs:
    return {prefix + name: value for name, value in specs.items()}


def seen(specs: Mapping[str, Spec]) -> tuple[str, str | None, str | None, str | None]:
    found = detect(specs)
    return found.kind, found.family, found.variant, found.spelling


def unet(**config: Any) -> Specs:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return of(UNet2DConditionModel(**{**LEVELS, "sample_size": 8, "cross_attention_dim": 12, **config}))


def _deep(levels: int) -> dict[str, Any]:
    pooled = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
    pooled["projection_class_embeddings_input_dim"] = 40
    cross, plain = "CrossAttn", ""
    kinds = [plain, cross, cross] if levels == 3 else [plain, cross, cross, plain]
    return pooled | {
        "block_out_channels": (8, 16, 16, 16)[:levels],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "transformer_layers_per_block": [1, 2, 10] if levels == 3 else [1, 4, 4, 4],
    }


def sd3(**config: Any) -> Specs:
    from diffusers import SD3Transformer2DModel

    small = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2}
    text = {"joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 8}
    with torch.device("meta"):
        return of(SD3Transformer2DModel(**{**small, **text, "pos_embed_max_size": 8, **config}))


def flux(**config: Any) -> Specs:
    from diffusers import FluxTransformer2DModel

    small = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 1}
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
    with torch.device("meta"):
        return of(FluxTransformer2DModel(**{"in_channels": 16, **small, **text, **config}))


DIFFUSERS: dict[str, tuple[Callable[[], Specs], str, str]] = {
    "sd1": (unet, "sd1", "base"),
    "sd1 deeper": (lambda: unet(layers_per_block=2), "sd1", "base"),
    "sd1 inpainting": (lambda: unet(in_channels=9), "sd1", "inpainting"),
    "sd1 pix2pix": (lambda: unet(in_channels=8), "sd1", "pix2pix"),
    "sd1 as wide as sd2": (lambda: unet(cross_attention_dim=1024), "sd1", "base"),
    "sd2": (lambda: unet(use_linear_projection=True), "sd2", "base"),
    "sd2 depth": (lambda: unet(use_linear_projection=True, in_channels=5), "sd2", "depth"),
    "sd2 as narrow as sd1": (lambda: unet(use_linear_projection=True, cross_attention_dim=768), "sd2", "base"),
    "sdxl": (lambda: unet(**_deep(3)), "sdxl", "base"),
    "sdxl inpainting": (lambda: unet(**_deep(3), in_channels=9), "sdxl", "inpainting"),
    "refiner": (lambda: unet(**_deep(4)), "sdxl-refiner", "base"),
    "sd3": (sd3, "sd3", "base"),
    "sd3.5 medium": (lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), "sd3", "3.5-medium"),
    "sd3.5 large": (lambda: sd3(num_layers=38, qk_norm="rms_norm"), "sd3", "3.5-large"),
    "flux schnell": (flux, "flux", "schnell"),
    "flux dev": (lambda: flux(guidance_embeds=True), "flux", "dev"),
    "flux fill": (lambda: flux(guidance_embeds=True, in_channels=96, out_channels=16), "flux", "fill"),
}


@cache
def network(name: str) -> Specs:
    return DIFFUSERS[name][0]()


@pytest.mark.parametrize("prefix", ["", "unet.", "transformer."])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_networks_that_diffusers_builds(name: str, prefix: str) -> None:
    _, family, variant = DIFFUSERS[name]
    assert seen(under(prefix, network(name))) == ("unet", family, variant, "diffusers")


def block(prefix: str, depth: int, *, linear: bool) -> Specs:
    ends = (8, 8) if linear else (8, 8, 1, 1)
    found = {f"{prefix}.proj_in.weight": spec(*ends), f"{prefix}.proj_out.weight": spec(*ends)}
    for i in range(depth):
        found[f"{prefix}.transformer_blocks.{i}.attn2.to_k.weight"] = spec(8, 12)
    return found


def compvis(blocks: int, depths: Mapping[int, int], *, linear: bool, label: bool = False, channels: int = 4) -> Specs:
    """Return the marks of a UNet as the original code names it: blocks in, depth of each one's transformer."""
    found = {"input_blocks.0.0.weight": spec(8, channels, 3, 3), "time_embed.0.weight": spec(32, 8)}
    for i in range(1, blocks):
        found[f"input_blocks.{i}.0.in_layers.2.weight"] = spec(8, 8, 3, 3)
        found[f"output_blocks.{i}.0.in_layers.2.weight"] = spec(8, 16, 3, 3)
    for i, depth in depths.items():
        found |= block(f"input_blocks.{i}.1", depth, linear=linear)
    found |= block("middle_block.1", max(depths.values()), linear=linear)
    if label:
        found["label_emb.0.0.weight"] = spec(32, 40)
    return found | {"out.2.weight": spec(4, 8, 3, 3)}


SHALLOW = dict.fromkeys((1, 2, 4, 5, 7, 8), 1)
XL, REFINER = {4: 2, 5: 2, 7: 10, 8: 10}, {4: 4, 5: 4, 7: 4, 8: 4}


def joint(blocks: int = 24, *, dual: bool = False) -> Specs:
    found = {"pos_embed": spec(1, 64, 8), "x_embedder.proj.weight": spec(8, 16, 2, 2)}
    for i in range(blocks):
        found[f"joint_blocks.{i}.context_block.adaLN_modulation.1.bias"] = spec(48)
        found[f"joint_blocks.{i}.x_block.attn.qkv.weight"] = spec(24, 8)
    return found | ({"joint_blocks.0.x_block.attn2.qkv.weight": spec(24, 8)} if dual else {})


def double(*, guided: bool = False, channels: int = 16) -> Specs:
    found = {"img_in.weight": spec(8, channels), "final_layer.linear.weight": spec(16, 8)}
    found |= {
        "double_blocks.0.img_attn.norm.key_norm.scale": spec(8),
        "double_blocks.0.img_mod.lin.weight": spec(48, 8),
    }
    found["single_blocks.0.linear1.weight"] = spec(56, 8)
    return found | ({"guidance_in.in_layer.weight": spec(8, 256)} if guided else {})


SINGLE: dict[str, tuple[Specs, str, str]] = {
    "sd1": (compvis(12, SHALLOW, linear=False), "sd1", "base"),
    "sd1 inpainting": (compvis(12, SHALLOW, linear=False, channels=9), "sd1", "inpainting"),
    "sd1 pix2pix": (compvis(12, SHALLOW, linear=False, channels=8), "sd1", "pix2pix"),
    "sd2": (compvis(12, SHALLOW, linear=True), "sd2", "base"),
    "sd2 depth": (compvis(12, SHALLOW, linear=True, channels=5), "sd2", "depth"),
    "sd2 unclip": (compvis(12, SHALLOW, linear=True, label=True), "sd2", "unclip"),
    "sdxl": (compvis(9, XL, linear=True, label=True), "sdxl", "base"),
    "sdxl inpainting": (compvis(9, XL, linear=True, label=True, channels=9), "sdxl", "inpainting"),
    "refiner": (compvis(12, REFINER, linear=True, label=True), "sdxl-refiner", "base"),
    "sd3": (joint(), "sd3", "base"),
    "sd3.5 medium": (joint(dual=True), "sd3", "3.5-medium"),
    "sd3.5 large": (joint(38), "sd3", "3.5-large"),
    "flux schnell": (double(), "flux", "schnell"),
    "flux dev": (double(guided=True), "flux", "dev"),
    "flux fill": (double(guided=True, channels=96), "flux", "fill"),
}


@pytest.mark.parametrize("prefix", ["", NETWORK, "diffusion_model."])
@pytest.mark.parametrize("name", SINGLE)
def test_networks_of_single_files(name: str, prefix: str) -> None:
    specs, family, variant = SINGLE[name]
    assert seen(under(prefix, specs)) == ("unet", family, variant, "single-file")


VAE = {"encoder.down.0.block.0.conv1.weight": spec(8, 8, 3, 3), "decoder.up.0.block.0.conv1.weight": spec(8, 8, 3, 3)}
CLIP = {"text_model.encoder.layers.0.mlp.fc1.weight": spec(24, 6)}
OPEN_CLIP = {"transformer.resblocks.0.attn.in_proj_weight": spec(18, 6)}
WHOLE: dict[str, tuple[Specs, str, tuple[str, ...]]] = {
    "sd1": (
        under(NETWORK, SINGLE["sd1"][0])
        | under("first_stage_model.", VAE)
        | under("cond_stage_model.transformer.", CLIP)
        | {"model_ema.decay": spec(), "model_ema.diffusion_modelout2weight": spec(4)},
        "sd1",
        ("unet", "vae", "te1", "ema"),
    ),
    "sd2": (
        under(NETWORK, SINGLE["sd2"][0]) | under("cond_stage_model.model.", OPEN_CLIP),
        "sd2",
        ("unet", "te1"),
    ),
    "sdxl": (
        under(NETWORK, SINGLE["sdxl"][0])
        | under("first_stage_model.", VAE)
        | under("conditioner.embedders.0.transformer.", CLIP)
        | under("conditioner.embedders.1.model.", OPEN_CLIP),
        "sdxl",
        ("unet", "vae", "te1", "te2"),
    ),
    "refiner": (
        under(NETWORK, SINGLE["refiner"][0]) | under("conditioner.embedders.0.model.", OPEN_CLIP),
        "sdxl-refiner",
        ("unet", "te1"),
    ),
    "sd3": (
        under(NETWORK, SINGLE["sd3"][0])
        | under("first_stage_model.", VAE)
        | under("text_encoders.clip_l.transformer.", CLIP)
        | under("text_encoders.clip_g.transformer.", CLIP)
        | {"text_encoders.t5xxl.transformer.shared.weight": spec(9, 4)},
        "sd3",
        ("unet", "vae", "te1", "te2", "te3"),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_checkpoints(name: str) -> None:
    specs, family, components = WHOLE[name]
    assert detect(specs) == Detection("checkpoint", family, "base", "single-file", components)


def test_a_diffusers_folder() -> None:
    specs = under("unet.", network("sdxl")) | under("vae.", {"decoder.up_blocks.0.resnets.0.conv1.weight": spec(8)})
    specs |= under("text_encoder.", CLIP) | under("text_encoder_2.", CLIP) | {"safety_checker.special": spec(3)}
    components = ("unet", "vae", "te1", "te2", "safety_checker")
    found = detect(specs)
    assert found == Detection("checkpoint", "sdxl", "base", "diffusers", components)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_vae_that_diffusers_builds(prefix: str) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        specs = of(AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **_levels(2)))
    found = detect(under(prefix, specs))
    assert (found.kind, found.family, found.spelling, found.components) == ("vae", None, "diffusers", ("vae",))


def _levels(count: int) -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_of_a_single_file(prefix: str) -> None:
    found = detect(under(prefix, VAE))
    assert (found.kind, found.spelling, found.components) == ("vae", "single-file", ("vae",))


def encoder(which: str) -> Specs:
    import transformers

    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        if which == "t5":
            config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            return of(transformers.T5EncoderModel(config))
        return of(getattr(transformers, which)(transformers.CLIPTextConfig(vocab_size=9, **small)))


@pytest.mark.parametrize("which", ["CLIPTextModel", "CLIPTextModelWithProjection", "t5"])
def test_text_encoders_that_transformers_builds(which: str) -> None:
    assert seen(encoder(which)) == ("text-encoder", None, None, "diffusers")


@pytest.mark.parametrize(
    "specs", [under("cond_stage_model.transformer.", CLIP), under("cond_stage_model.model.", OPEN_CLIP)]
)
def test_text_encoders_of_single_files(specs: Specs) -> None:
    assert seen(specs) == ("text-encoder", None, None, "single-file")


OTHERS: dict[str, Specs] = {
    "nothing": {},
    "a classifier": {"fc.weight": spec(10, 8), "conv1.weight": spec(8, 3, 3, 3)},
    "joint attention with rotation": {
        "transformer_blocks.0.attn.add_k_proj.weight": spec(8, 8),
        "transformer_blocks.0.attn.to_k.weight": spec(8, 8),
        "img_in.weight": spec(8, 16),
    },
    "shared modulation": {k: v for k, v in double().items() if "img_mod" not in k}
    | {"double_stream_modulation_img.lin.weight": spec(48, 8)},
    "patches in three dimensions": {k: v for k, v in network("flux schnell").items() if "x_embedder" not in k}
    | {"x_embedder.proj.weight": spec(8, 16, 1, 2, 2)},
    "a video model": SINGLE["sd2 unclip"][0] | {"input_blocks.1.1.time_stack.0.attn1.to_k.weight": spec(8, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_family_is(name: str) -> None:
    found = detect(OTHERS[name])
    assert (found.kind, found.family) == ("other", None)


def test_blocks_are_counted_by_whole_numbers() -> None:
    """A model with blocks 0, 1 and 10 has eleven, not two."""
    specs = {name: value for name, value in SINGLE["sd1"][0].items() if not name.startswith("input_blocks.11.")}
    assert "input_blocks.10.0.in_layers.2.weight" in specs
    assert detect(specs).family is None
    assert detect(specs | {"input_blocks.11.0.in_layers.2.weight": spec(8, 8, 3, 3)}).family == "sd1"
    assert detect(specs | {"input_blocks.110.0.in_layers.2.weight": spec(8, 8, 3, 3)}).family is None


def test_marker_keys_are_told() -> None:
    found = detect(WHOLE["sdxl"][0] | {"v_pred": spec(0), "ztsnr": spec(0)})
    assert (found.family, found.variant) == ("sdxl", "base")
    assert [warning.split(":")[0] for warning in found.warnings] == ["has the key v_pred", "has the key ztsnr"]


def test_the_family_can_be_said() -> None:
    found = detect(SINGLE["sd1"][0], family="sd2")
    assert (found.family, found.spelling) == ("sd2", "single-file")
    assert detect(OTHERS["a classifier"], family="flux").family == "flux"


def test_a_family_that_does_not_exist() -> None:
    with pytest.raises(FormatError, match="'sd9' is no family.*sdxl-refiner"):
        detect(SINGLE["sd1"][0], family="sd9")


def test_a_tie_names_both_until_the_family_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = [layout for layout in layouts.LAYOUTS if (layout.family, layout.spelling) == ("sd3", "single-file")]
    two = type(one)("flux", one.spelling, one.needs, one.marks, one.variant)
    monkeypatch.setattr(layouts, "LAYOUTS", (one, two))
    with pytest.raises(FormatError, match=r"sd3 \(single-file\) and flux \(single-file\).*--family"):
        detect(SINGLE["sd3"][0])
    for family in FAMILIES:
        assert detect(SINGLE["sd3"][0], family=family).family == family


@pytest.mark.parametrize(
    ("name", "spelling", "component"),
    [
        ("model.diffusion_model.out.2.weight", "single-file", "unet"),
        ("first_stage_model.quant_conv.weight", "single-file", "vae"),
        ("cond_stage_model.transformer.text_model.x", "single-file", "te1"),
        ("conditioner.embedders.1.model.x", "single-file", "te2"),
        ("conditioner.embedders.10.model.x", "single-file", "other"),
        ("model_ema.decay", "single-file", "ema"),
        ("betas", "single-file", "other"),
        ("unet.conv_in.weight", "diffusers", "unet"),
        ("transformer.x_embedder.weight", "diffusers", "unet"),
        ("text_encoder.text_model.x", "diffusers", "te1"),
        ("text_encoder_2.text_model.x", "diffusers", "te2"),
        ("text_encoder_3.shared.weight", "diffusers", "te3"),
        ("vae.decoder.x", "diffusers", "vae"),
        ("vae.decoder.x", "single-file", "other"),
        ("vae.decoder.x", None, "other"),
    ],
)
def test_component_of(name: str, spelling: str | None, component: str) -> None:
    assert component_of(name, spelling) == component


NAMES = st.sampled_from(sorted({*SINGLE["sdxl"][0], *SINGLE["flux dev"][0], *SINGLE["sd3"][0], *network("sd1"), *VAE}))
ODD = st.text(max_size=12) | st.integers(0, 10**30).map("input_blocks.{}.0.x".format)
SHAPES = st.lists(st.integers(0, 9), max_size=5).map(tuple)


@given(st.dictionaries(NAMES | ODD, st.builds(Spec, SHAPES, st.sampled_from(DType)), max_size=40))
def test_any_tensors_are_something(specs: Specs) -> None:
    tie = ""
    found = None
    try:
        found = detect(specs).family
    except FormatError as error:
        tie = str(error)
    assert found in (*FAMILIES, None)
    assert not tie or "could be" in tie


def test_names_of_both_spellings_are_told() -> None:
    blocks = {
        "down_blocks.2.resnets.0.conv1.weight": spec(8, 8, 3, 3),
        "input_blocks.8.0.in_layers.2.weight": spec(8, 8, 3, 3),
    }
    mixture = blocks | {"label_emb.0.0.weight": spec(8, 8)}
    for family in (None, "sdxl"):
        with pytest.raises(FormatError, match="both spellings"):
            detect(mixture, family=family)


def test_a_number_of_thousands_of_digits() -> None:
    assert detect({f"input_blocks.{'9' * 6000}.0.weight": spec(1)}).family is None
