"""Key maps: diffusers' own converters read what they write, and every spelling comes back bit for bit."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from sdformats.errors import CorruptFile, UnsupportedFile
from sdformats.keymap import EXTRAS
from sdformats.layout import DIFFUSERS, SINGLE_FILE, detect
from sdformats.renamed import component, spelled
from sdformats.tensor import DType, Spec
from tests import tiny
from tests.formats.adapters.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdformats.tensor import TensorSource

UNETS = ("sd1", "sd2", "sdxl", "sdxl-refiner")
FAMILIES = (*UNETS, "sd3", "sd3.5", "flux")
TYPES = {torch.float16: DType.F16, torch.float32: DType.F32, torch.int64: DType.I64, torch.float8_e4m3fn: DType.F8_E4M3}
OPEN_CLIP = "cond_stage_model.model."
ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    "sd3": {
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
    "flux": {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.t5xxl.transformer."},
}


class Named(Memory):
    """Tensors in memory under names of our choice."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self._specs[name] = Spec(tuple(value.shape), TYPES[value.dtype])
            self._data[name] = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def position(self, name: str) -> tuple[int, int]:
        """See `TensorSource`."""
        return 0, list(self._specs).index(name)


def loaded(source: TensorSource, prefix: str = "") -> dict[str, Tensor]:
    """Return a source's tensors, read in uneven pieces."""
    types = {dtype: kind for kind, dtype in TYPES.items()}
    found = {}
    for name, spec in source.specs.items():
        data = bytearray(spec.nbytes)
        for start in range(0, spec.nbytes, 100):
            source.read_into(name, start, memoryview(data)[start : start + 100])
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = torch.frombuffer(data, dtype=types[spec.dtype]).reshape(spec.shape)
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@cache
def single(family: str) -> TensorSource:
    """A single file that was made of a folder."""
    return spelled(Named(tiny.tensors(family)), SINGLE_FILE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_single_file_and_comes_back_bit_for_bit(family: str) -> None:
    made = single(family)
    seen = detect(made.specs)
    assert (seen.kind, seen.family, seen.spelling) == ("checkpoint", family.removesuffix(".5"), SINGLE_FILE)
    assert made.notes == ()
    again = spelled(Named(loaded(made)), DIFFUSERS)
    assert same(loaded(again), tiny.tensors(family))


@pytest.mark.parametrize("family", UNETS)
def test_diffusers_own_converter_reads_the_unet(family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    network = tiny.components(family)["unet"]
    given = loaded(single(family))
    assert given["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"].dim() == 4
    assert same(
        convert_ldm_unet_checkpoint(given, dict(network.config)), {k: v.half() for k, v in network.state_dict().items()}
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_diffusers_own_converter_reads_the_vae(family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    network = tiny.components(family)["vae"]
    given = loaded(single(family))
    prefix = "vae." if family == "flux" else "first_stage_model."
    assert given[f"{prefix}encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)
    assert same(
        convert_ldm_vae_checkpoint(given, dict(network.config)), {k: v.half() for k, v in network.state_dict().items()}
    )


@pytest.mark.parametrize(("family", "place"), [(family, place) for family in ENCODERS for place in ENCODERS[family]])
def test_diffusers_own_converters_read_the_text_encoders(family: str, place: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    prefix, given = ENCODERS[family][place], loaded(single(family))
    expected = {
        name.removeprefix(f"{place}."): value
        for name, value in tiny.tensors(family).items()
        if name.startswith(f"{place}.")
    }
    if "shared.weight" in expected:
        expected["encoder.embed_tokens.weight"] = expected["shared.weight"]
    if prefix.endswith(".transformer."):
        text = {name: value for name, value in given.items() if name.startswith(prefix)}
        found = convert_ldm_clip_checkpoint(text, prefix)
    else:
        assert any(name.startswith(f"{prefix}transformer.resblocks.0.attn.in_proj_") for name in given)
        found = convert_open_clip_checkpoint(tiny.components(family)[place], given, prefix)
    assert same(found, expected)


@pytest.mark.parametrize("family", ["sd3", "sd3.5"])
def test_diffusers_own_converter_reads_sd3_s_transformer(family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    made = convert_sd3_transformer_checkpoint_to_diffusers(inside(loaded(single(family)), "model.diffusion_model."))
    assert same(made, inside(tiny.tensors(family), "transformer."))


def test_diffusers_own_converter_reads_flux_s_transformer() -> None:
    """It has the number of rows written in, but not that of columns."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        shapes = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True).state_dict()
    given = {
        f"transformer.{name}": torch.randn(*value.shape[:1], *([1] if value.dim() == 2 else []))
        for name, value in shapes.items()
    }
    made = convert_flux_transformer_checkpoint_to_diffusers(loaded(spelled(Named(given), SINGLE_FILE)))
    assert same(made, inside(given, "transformer."))


def test_only_the_last_context_norm_of_sd3_is_swapped() -> None:
    ours, theirs = tiny.tensors("sd3"), loaded(single("sd3"))
    for block, rows in enumerate((96, 32)):
        mine = ours[f"transformer.transformer_blocks.{block}.norm1_context.linear.bias"]
        found = theirs[f"model.diffusion_model.joint_blocks.{block}.context_block.adaLN_modulation.1.bias"]
        assert mine.shape == (rows,)
        assert torch.equal(found, mine if rows == 96 else torch.cat([mine[16:], mine[:16]]))


def test_the_first_encoder_of_sd3_is_not_projected_in_a_single_file() -> None:
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    assert name not in single("sd3").specs
    given = loaded(single("sd3")) | {name: torch.randn(12, 12).half()}
    folder = loaded(spelled(Named(given), DIFFUSERS))
    assert torch.equal(folder["text_encoder.text_projection.weight"], torch.eye(12).half())
    assert torch.equal(folder[f"{EXTRAS}.{name}"], given[name])
    assert same(loaded(spelled(Named(folder), SINGLE_FILE)), given)


def test_a_projection_that_does_something_is_not_dropped() -> None:
    given = tiny.tensors("sd3")
    given["text_encoder.text_projection.weight"] = torch.randn(12, 12).half()
    made = loaded(spelled(Named(given), SINGLE_FILE))
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    assert torch.equal(made[name], given["text_encoder.text_projection.weight"])


def test_single_files_hold_t5_s_words_twice_and_folders_once() -> None:
    given = tiny.tensors("sd3")
    again, first = (f"text_encoders.t5xxl.transformer.{name}.weight" for name in ("encoder.embed_tokens", "shared"))
    made = loaded(single("sd3"))
    assert torch.equal(made[again], made[first])
    assert "text_encoder_3.encoder.embed_tokens.weight" not in given
    made[again] = made[again] + 1  # they are no longer the same
    folder = loaded(spelled(Named(made), DIFFUSERS))
    assert torch.equal(folder["text_encoder_3.encoder.embed_tokens.weight"], made[again])
    assert same(loaded(spelled(Named(folder), SINGLE_FILE)), made)


def fp8_of(tensors: dict[str, Tensor], prefix: str, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return tensors with the weights of a network in fp8, factors beside them as ``factors`` says by their names' ends."""
    found = dict(tensors)
    for name, value in tensors.items():
        if name.startswith(prefix) and name.endswith(".weight") and value.dim() == 2:
            module = name.removesuffix(".weight")
            found[name] = value.to(torch.float8_e4m3fn)
            factor = next((one for end, one in factors.items() if module.endswith(end)), 0.5)
            found[f"{module}.scale_weight"] = torch.tensor(factor)
            found[f"{module}.scale_input"] = torch.tensor([1.0])
    return found


def test_factors_of_fp8_weights_travel_with_them() -> None:
    given = fp8_of(loaded(single("flux")), "model.diffusion_model.", {"img_attn.qkv": 0.25})
    given["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn).zero_()
    folder = loaded(spelled(Named(given), DIFFUSERS))
    block = "transformer.transformer_blocks.0.attn.to_"
    assert [folder[f"{block}{x}.scale_weight"].item() for x in ("q", "k", "v", "out.0")] == [0.25, 0.25, 0.25, 0.5]
    assert folder["transformer.norm_out.linear.weight"].dtype == torch.float8_e4m3fn
    assert same(loaded(spelled(Named(folder), SINGLE_FILE)), given)


def test_factors_that_differ_become_factors_of_rows() -> None:
    given = fp8_of(tiny.tensors("flux"), "transformer.", {"to_q": 0.25, "to_k": 0.5, "to_v": 0.75, "proj_mlp": 2.0})
    made = loaded(spelled(Named(given), SINGLE_FILE))
    factors = made["model.diffusion_model.single_blocks.1.linear1.scale_weight"]
    assert torch.equal(factors, torch.tensor([0.25] * 16 + [0.5] * 16 + [0.75] * 16 + [2.0] * 64))
    again = loaded(spelled(Named(made), DIFFUSERS))
    assert torch.equal(again["transformer.single_transformer_blocks.1.attn.to_k.scale_weight"], torch.full((16,), 0.5))


def original_sd2() -> dict[str, Tensor]:
    """Return an SD2 single file as it was published: with a last layer, a projection and a schedule."""
    given = loaded(single("sd2"))
    last = {n.replace("resblocks.2", "resblocks.3"): v + 1 for n, v in given.items() if "resblocks.2." in n}
    given |= last | {
        f"{OPEN_CLIP}text_projection": torch.randn(12, 12).half(),
        f"{OPEN_CLIP}logit_scale": torch.tensor(4.6),
    }
    return given | {"betas": torch.rand(10), "model_ema.decay": torch.tensor(0.5)}


def test_what_diffusers_drops_is_kept_as_extras_and_comes_back() -> None:
    given = original_sd2()
    folder = spelled(Named(given), DIFFUSERS)
    extras = [name.removeprefix(f"{EXTRAS}.") for name in folder.specs if name.startswith(EXTRAS)]
    assert {
        "betas",
        "model_ema.decay",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
    } <= set(extras)
    assert "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight" in extras
    assert len(extras) == 4 + 12
    assert "text_encoder.text_model.encoder.layers.2.mlp.fc1.weight" in folder.specs
    assert "text_encoder.text_model.encoder.layers.3.mlp.fc1.weight" not in folder.specs
    assert same(loaded(spelled(Named(loaded(folder)), SINGLE_FILE)), given)


def test_position_ids_are_extras() -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    given = loaded(single("sd1")) | {name: torch.arange(7)[None]}
    folder = spelled(Named(given), DIFFUSERS)
    assert f"{EXTRAS}.{name}" in folder.specs
    assert same(loaded(spelled(Named(loaded(folder)), SINGLE_FILE)), given)


def test_the_projection_of_sdxl_s_second_encoder_is_transposed() -> None:
    given = loaded(single("sdxl"))
    ours = tiny.tensors("sdxl")["text_encoder_2.text_projection.weight"]
    assert torch.equal(given["conditioner.embedders.1.model.text_projection"], ours.T)
    assert not torch.equal(ours, ours.T)


@pytest.mark.parametrize("place", ["text_encoder", "text_encoder_2"])
def test_an_encoder_without_text_model_is_read(place: str) -> None:
    given = {name.replace(f"{place}.text_model.", f"{place}."): value for name, value in tiny.tensors("sdxl").items()}
    assert same(loaded(spelled(Named(given), SINGLE_FILE)), loaded(single("sdxl")))


def test_a_single_file_without_text_model_is_read() -> None:
    given = {name.replace(".text_model.", "."): value for name, value in loaded(single("sd1")).items()}
    assert same(loaded(spelled(Named(given), DIFFUSERS)), tiny.tensors("sd1"))


def test_old_names_of_the_vae_s_attention_are_read() -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    given = {}
    for name, value in tiny.tensors("sd1").items():
        for new, before in old.items():
            if f"mid_block.attentions.0.{new}." in name and name.startswith("vae."):
                name = name.replace(new, before)  # noqa: PLW2901 - as it was
        given[name] = value
    assert "vae.encoder.mid_block.attentions.0.proj_attn.bias" in given
    assert same(loaded(spelled(Named(given), SINGLE_FILE)), loaded(single("sd1")))


def test_the_upsampler_s_place_follows_the_attention() -> None:
    names = {family: set(single(family).specs) for family in UNETS}
    place = "model.diffusion_model.output_blocks.2.{}.conv.weight"
    for family, there in names.items():
        behind = 2 if family == "sdxl" else 1
        assert place.format(behind) in there
        assert place.format(3 - behind) not in there


def test_a_vae_alone_is_respelled() -> None:
    given = {name.removeprefix("vae."): value for name, value in tiny.tensors("sd1").items() if name.startswith("vae.")}
    made = spelled(Named(given), SINGLE_FILE)
    assert {name.partition(".")[0] for name in made.specs} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert same(loaded(spelled(Named(loaded(made)), DIFFUSERS), "vae."), given)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_a_unet_alone_is_respelled(prefix: str) -> None:
    bare = {
        name.removeprefix("unet."): value for name, value in tiny.tensors("sdxl").items() if name.startswith("unet.")
    }
    made = spelled(Named({prefix + name: value for name, value in bare.items()}), SINGLE_FILE)
    assert all(name.startswith("model.diffusion_model.") for name in made.specs)
    assert same(loaded(spelled(Named(loaded(made)), DIFFUSERS), "unet."), bare)
    naked = {name.removeprefix("model.diffusion_model."): value for name, value in loaded(made).items()}
    assert same(loaded(spelled(Named(naked), DIFFUSERS), "unet."), bare)


def named(network: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's tensors, CLIP's with ``text_model.``, T5's words once."""
    flat = any(name.startswith("embeddings.") for name in network.state_dict())
    return [
        (f"{'text_model.' if flat else ''}{name}", value)
        for name, value in network.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_component_has_the_names_of_its_module(family: str) -> None:
    for place, network in tiny.components(family).items():
        expected = inside(tiny.tensors(family), f"{place}.")
        for source in (single(family), Named(tiny.tensors(family))):
            assert same(loaded(component(source, place)), expected)
        assert set(expected) == {name for name, _ in named(network)}


def test_a_component_s_own_file_is_a_component() -> None:
    bare = {
        name.removeprefix("unet."): value for name, value in tiny.tensors("sd1").items() if name.startswith("unet.")
    }
    assert same(loaded(component(Named(bare), "unet")), bare)
    with pytest.raises(UnsupportedFile, match="has no text_encoder_2 .*expected one of"):
        component(single("sd1"), "text_encoder_2")


def test_a_safety_checker_is_left_and_said() -> None:
    given = tiny.tensors("sd1") | {"safety_checker.concept_embeds": torch.ones(3).half()}
    made = spelled(Named(given), SINGLE_FILE)
    assert same(loaded(made), loaded(single("sd1")))
    assert made.notes == ("1 tensors have no place in a single file, among them safety_checker.concept_embeds",)


def test_what_is_in_its_spelling_stays_as_it_is() -> None:
    source = Named(tiny.tensors("sd1"))
    assert spelled(source, DIFFUSERS) is source


def test_other_files_have_no_other_spelling() -> None:
    with pytest.raises(UnsupportedFile, match="is other, whose other spelling is not known"):
        spelled(Named({"a.weight": torch.ones(3).half()}), DIFFUSERS)


def test_a_missing_part_is_named() -> None:
    given = tiny.tensors("sd2")
    del given["text_encoder.text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CorruptFile, match=r"has no text_model\.encoder\.layers\.1\.self_attn\.k_proj\.bias beside it"):
        spelled(Named(given), SINGLE_FILE)


def test_two_names_of_one_tensor_are_refused() -> None:
    given = tiny.tensors("sd1")
    new = "vae.encoder.mid_block.attentions.0.to_q.bias"
    given[new.replace("to_q", "query")] = given[new]
    with pytest.raises(CorruptFile, match="is there twice, under an old and a new name"):
        spelled(Named(given), SINGLE_FILE)
