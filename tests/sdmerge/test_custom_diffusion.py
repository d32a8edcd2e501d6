"""Custom Diffusion's deltas: every form to every other, and baked."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdmerge
from sdformats.custom_diffusion.delta import describe
from sdformats.errors import CorruptFile, FormatError, UnsafeFile
from sdformats.files import open_source
from tests.formats import hostile_pickles as hostile
from tests.formats.pickle_oracle import same
from tests.sdmerge.custom_deltas import (
    FORMS,
    MODEL,
    TINY,
    WORDS,
    base,
    delta,
    equal,
    load,
    original,
    output,
    processors,
    save,
    trained,
    vector,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class TestForms:
    @pytest.mark.parametrize(("first", "second"), [*product(FORMS, FORMS)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_any_to_any_and_back_bit_by_bit(self, tmp_path: Path, first: str, second: str, dtype: torch.dtype) -> None:
        weights = trained(1, dtype)
        words = {word: tensor.to(dtype) for word, tensor in WORDS.items()}
        start = save(output(tmp_path, first, "a"), first, weights, words)
        sdmerge.convert(start, output(tmp_path, second, "b"), to=second)
        sdmerge.convert(output(tmp_path, second, "b"), output(tmp_path, first, "c"), to=first)
        for step in ("b", "c"):
            found, said = load(output(tmp_path, second if step == "b" else first, step))
            assert equal(found, weights)
            assert equal(said, words)

    @pytest.mark.parametrize("form", FORMS)
    def test_what_inspect_says(self, tmp_path: Path, form: str) -> None:
        path = save(output(tmp_path, form, "a"), form, trained(1), WORDS)
        found = sdmerge.inspect_path(path)
        assert (found["kind"], found["layout"]) == ("custom-diffusion", form)
        with open_source(path) as source:
            said = describe(source)
        assert said["trained"] == ["to_k", "to_v"]
        assert (said["modules"], said["ranks"], said["words"]) == (32, None, {"<new1>": [48], "<new2>": [48]})

    def test_safetensors_hold_the_same(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.bin", "delta", trained(1), WORDS)
        sdmerge.convert(path, tmp_path / "a.safetensors")
        held = load_file(tmp_path / "a.safetensors")
        assert {key for key in held if not key.startswith("unet.")} == {f"modifier_token.{word}" for word in WORDS}
        sdmerge.convert(tmp_path / "a.safetensors", tmp_path / "b.bin")
        assert same(torch.load(tmp_path / "b.bin", weights_only=True), delta(trained(1), WORDS))

    def test_diffusers_file_without_its_folder(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "d", "diffusers", trained(1), WORDS)
        alone = folder / "pytorch_custom_diffusion_weights.bin"
        sdmerge.convert(alone, tmp_path / "a.ckpt", to="original")
        assert list(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == list(trained(1))
        with pytest.raises(FormatError, match=r"keeps words in files of their own .<new1>, <new2>.; give a folder"):
            sdmerge.convert(folder, tmp_path / "w.bin", to="diffusers")
        report = sdmerge.convert(folder, tmp_path / "w.bin", to="diffusers", allow_loss=True)
        assert "left out, as they would be files of their own: <new1>, <new2>" in report.notes
        assert equal(torch.load(tmp_path / "w.bin", weights_only=True), processors(trained(1)))

    def test_diffusers_own_unet_saves_and_takes_them(self, tmp_path: Path) -> None:
        unet = custom_unet(trained(1))
        unet.save_attn_procs(str(tmp_path / "saved"), safe_serialization=True)
        unet.save_attn_procs(str(tmp_path / "pickled"), safe_serialization=False)
        assert (tmp_path / "pickled" / "pytorch_custom_diffusion_weights.bin").is_file()
        sdmerge.convert(tmp_path / "pickled", tmp_path / "p.bin", to="delta")
        assert equal(load(tmp_path / "p.bin")[0], trained(1))
        sdmerge.convert(tmp_path / "saved", tmp_path / "a.bin", to="delta")
        assert equal(load(tmp_path / "a.bin")[0], trained(1))
        sdmerge.convert(tmp_path / "a.bin", tmp_path / "again", to="diffusers")
        before, after = (
            load_file(tmp_path / name / "pytorch_custom_diffusion_weights.safetensors") for name in ("saved", "again")
        )
        assert equal(before, after)

    def test_sdxl_has_a_vector_for_each_encoder(self, tmp_path: Path) -> None:
        name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        value = {
            "unet": {name: torch.randn(8, 2048)},
            "modifier_token": {"<new1>": [torch.randn(768), torch.randn(1280)]},
        }
        torch.save(value, tmp_path / "a.bin")
        sdmerge.convert(tmp_path / "a.bin", tmp_path / "a.safetensors")
        sdmerge.convert(tmp_path / "a.safetensors", tmp_path / "b.bin")
        assert same(torch.load(tmp_path / "b.bin", weights_only=True), value)
        assert sdmerge.inspect_path(tmp_path / "a.bin")["family"] == "sdxl"
        for form in ("original", "diffusers"):
            with pytest.raises(FormatError, match=r"one vector for each word|vectors for several text encoders"):
                sdmerge.convert(tmp_path / "a.bin", output(tmp_path, form, "c"), to=form)

    def test_a_text_encoder_comes_along(self, tmp_path: Path) -> None:
        value = delta(trained(1), WORDS) | {"text_encoder": {"text_model.final_layer_norm.weight": torch.randn(48)}}
        torch.save(value, tmp_path / "a.bin")
        sdmerge.convert(tmp_path / "a.bin", tmp_path / "a.safetensors")
        sdmerge.convert(tmp_path / "a.safetensors", tmp_path / "b.bin")
        assert same(torch.load(tmp_path / "b.bin", weights_only=True), value)
        with pytest.raises(FormatError, match="no place for a text encoder"):
            sdmerge.convert(tmp_path / "a.bin", tmp_path / "c.ckpt", to="original")

    def test_queries_and_outputs_too(self, tmp_path: Path) -> None:
        stem = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2."
        whole = load_file(MODEL)
        more = {f"{stem}{end}": whole[f"{stem}{end}"] for end in ("to_q.weight", "to_out.0.weight", "to_out.0.bias")}
        torch.save({"state_dict": {**trained(1), **more}}, tmp_path / "a.ckpt")
        sdmerge.convert(tmp_path / "a.ckpt", tmp_path / "d", to="diffusers")
        held = load_file(tmp_path / "d" / "pytorch_custom_diffusion_weights.safetensors")
        attention = "mid_block.attentions.0.transformer_blocks.0.attn2.processor."
        ends = ("to_q_custom_diffusion.weight", "to_out_custom_diffusion.0.weight", "to_out_custom_diffusion.0.bias")
        assert {f"{attention}{end}" for end in ends} <= held.keys()
        sdmerge.convert(tmp_path / "d", tmp_path / "b.ckpt", to="original")
        assert equal(torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"], {**trained(1), **more})

    def test_a_word_is_no_way_out_of_the_folder(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.bin", "delta", trained(1), {"<../../x>": vector(1)})
        with pytest.raises(FormatError, match="is no name for a file"):
            sdmerge.convert(path, tmp_path / "d", to="diffusers")

    def test_broken_and_hostile_ones(self, tmp_path: Path) -> None:
        value = delta(trained(1), WORDS)
        name = next(iter(value["unet"]))
        for broken, says in (
            ({"u": torch.ones(32, 4)}, "has only one of its factors"),
            ({"u": torch.ones(32, 4), "v": torch.ones(5, 48)}, r"has factors of F32 \[32, 4\] and F32 \[5, 48\]"),
        ):
            torch.save({**value, "unet": {**value["unet"], name: broken}}, tmp_path / "b.bin")
            with pytest.raises(CorruptFile, match=says):
                sdmerge.convert(tmp_path / "b.bin", tmp_path / "o.bin", to="delta")
        torch.save(
            {"state_dict": {"model.diffusion_model.nowhere.attn2.to_k.weight": torch.ones(2, 2)}}, tmp_path / "n.ckpt"
        )
        with pytest.raises(CorruptFile, match="is no weight of a cross-attention"):
            sdmerge.convert(tmp_path / "n.ckpt", tmp_path / "o.bin", to="delta")
        call = hostile.call(hostile.name("os", "system"), f"touch {tmp_path / 'ran'}")
        path = hostile.write_zip(
            tmp_path / "h.bin", {"unet": {name: hostile.tensor()}, "modifier_token": {"<new1>": call}}
        )
        with pytest.raises(UnsafeFile, match="os.system"):
            sdmerge.convert(path, tmp_path / "o.bin", to="delta")
        assert not (tmp_path / "ran").exists()


def custom_unet(weights: Mapping[str, Tensor]) -> Any:
    """Return the tiny UNet with diffusers' processors for these keys and values."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "config" / "unet"))
    made = {}
    held = processors(weights)
    for name in unet.attn_processors:
        mine = {key.removeprefix(f"{name}."): tensor for key, tensor in held.items() if key.startswith(f"{name}.")}
        size = mine["to_k_custom_diffusion.weight"].shape if mine else (None, None)
        made[name] = CustomDiffusionAttnProcessor(
            train_kv=bool(mine), train_q_out=False, hidden_size=size[0], cross_attention_dim=size[1]
        )
        made[name].load_state_dict(mine, strict=True)
    unet.set_attn_processor(made)
    return unet


class TestBaking:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_new_weights_take_the_place_of_the_old(self, tmp_path: Path, form: str) -> None:
        path = save(output(tmp_path, form, "a"), form, trained(1), WORDS)
        sdmerge.bake(MODEL, [path], output=tmp_path / "o.safetensors", dtype="fp32")
        found = load_file(tmp_path / "o.safetensors")
        for key, tensor in trained(1).items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=2e-7)
        assert torch.equal(load_file(tmp_path / "o.new1.safetensors")["emb_params"].reshape(-1), WORDS["<new1>"])
        sdmerge.bake(MODEL, [(path, 0.25)], output=tmp_path / "q.safetensors", dtype="fp32")
        quarter = load_file(tmp_path / "q.safetensors")
        for key, tensor in trained(1).items():
            assert torch.allclose(quarter[key], base()[key] * 0.75 + tensor * 0.25, rtol=0, atol=2e-7)

    def test_new_biases_and_a_new_text_encoder(self, tmp_path: Path) -> None:
        whole = load_file(MODEL)
        out = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
        theirs = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0"
        text = "text_model.final_layer_norm"
        new = {end: torch.randn_like(whole[f"{theirs}.{end}"].float()) for end in ("weight", "bias")}
        norm = {end: torch.randn(48) for end in ("weight", "bias")}
        value = delta(trained(1), {}) | {"text_encoder": {f"{text}.{end}": tensor for end, tensor in norm.items()}}
        value["unet"] |= {f"{out}.{end}": tensor for end, tensor in new.items()}
        torch.save(value, tmp_path / "a.bin")
        sdmerge.bake(MODEL, [tmp_path / "a.bin"], output=tmp_path / "o.safetensors", dtype="fp32")
        found = load_file(tmp_path / "o.safetensors")
        for end in ("weight", "bias"):
            assert torch.allclose(found[f"{theirs}.{end}"], new[end], atol=1e-6)
            assert torch.allclose(found[f"cond_stage_model.transformer.{text}.{end}"], norm[end], atol=1e-6)

    def test_the_unet_paints_as_diffusers_own_processors_do(self, tmp_path: Path) -> None:
        from diffusers import StableDiffusionPipeline

        path = save(tmp_path / "a.ckpt", "original", trained(1), {})
        sdmerge.bake(MODEL, [path], output=tmp_path / "o.safetensors", dtype="fp32")
        baked: Any = StableDiffusionPipeline.from_single_file(
            str(tmp_path / "o.safetensors"), config=str(TINY / "config"), local_files_only=True
        ).unet
        custom = custom_unet(trained(1))
        custom.load_state_dict({**custom.state_dict(), **baked.state_dict()})
        source = torch.Generator().manual_seed(1)
        latents, context = torch.randn(1, 4, 8, 8, generator=source), torch.randn(1, 77, 48, generator=source)
        with torch.no_grad():
            outputs = [unet.eval()(latents, torch.tensor(500), context).sample for unet in (baked, custom)]
        assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_forms_hold_the_same_by_torch_alone(tmp_path: Path) -> None:
    """The forms of these tests are one delta: what was written by hand for one can be read by the rules of another."""
    assert load(save(tmp_path / "o.ckpt", "original", trained(1), WORDS))[0].keys() == trained(1).keys()
    assert original(trained(1), WORDS)["state_dict"]["embed"].shape == (2, 48)
    save_file(processors(trained(1)), str(tmp_path / "p.safetensors"))
