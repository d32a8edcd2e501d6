"""Each policy of a merge, seen in the output and in the notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sdmerge import api
from sdmerge.errors import FamilyError, MismatchError, NonFiniteInput, OutputOverflow, RequestError
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def blend(a: Tensor, b: Tensor, alpha: float = 0.5) -> Tensor:
    return ((1 - alpha) * a.double() + alpha * b.double()).to(a.dtype)


def merged(
    tmp_path: Path, out: Path, a: dict[str, Tensor], b: dict[str, Tensor], **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    paths = [toys.save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("a", a), ("b", b))]
    report = api.weighted_sum(paths, output=out, **options)
    return report, load_file(out)


def test_plain_tensors_are_merged(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    report, got = merged(tmp_path, out, a, b)
    assert got.keys() == a.keys()
    assert all(torch.equal(got[name], blend(a[name], b[name])) for name in toys.shapes())
    assert report.notes == ()
    assert report.counts == {"merge": len(a) - 1, "copy": 1}


@pytest.mark.parametrize("channels", [9, 8])
def test_wide_unets_keep_their_further_channels(tmp_path: Path, out: Path, channels: int) -> None:
    a, b = toys.toy(1), toys.toy(2)
    wide = torch.randn(8, channels, 3, 3).half()
    report, got = merged(tmp_path, out, {**a, toys.CONV_IN: wide}, b)
    assert torch.equal(got[toys.CONV_IN][:, :4], blend(wide[:, :4], b[toys.CONV_IN]))
    assert torch.equal(got[toys.CONV_IN][:, 4:], wide[:, 4:])
    assert any("input channels" in note and f"other {channels - 4}" in note for note in report.notes)


def test_a_narrow_model_takes_the_shared_channels_of_a_wide_one(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    wide = torch.randn(8, 9, 3, 3).half()
    _, got = merged(tmp_path, out, a, {**b, toys.CONV_IN: wide})
    assert torch.equal(got[toys.CONV_IN], blend(a[toys.CONV_IN], wide[:, :4]))


def test_another_shape_is_an_error_that_names_the_key(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    with pytest.raises(MismatchError, match="attn2.to_k.weight.*different shapes"):
        merged(tmp_path, out, a, {**b, toys.TO_K: torch.zeros(8, 7)})
    assert not out.exists()


def test_missing_keys_keep_the_value_of_a(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    del b[toys.TO_K]
    report, got = merged(tmp_path, out, a, b)
    assert torch.equal(got[toys.TO_K], a[toys.TO_K])
    assert report.notes == (f"missing in B, A's value is kept: {toys.TO_K}",)


def test_missing_keys_can_be_dropped_or_refused(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    del b[toys.TO_K]
    with pytest.raises(MismatchError, match="missing in B"):
        merged(tmp_path, out, a, b, missing="error")
    assert not out.exists()
    report, got = merged(tmp_path, out, a, b, missing="drop")
    assert got.keys() == a.keys() - {toys.TO_K}
    assert report.notes == (f"missing in B, left out: {toys.TO_K}",)


def test_keys_that_only_others_have_are_reported(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    report, got = merged(tmp_path, out, a, {**b, "extra.weight": torch.ones(2)})
    assert got.keys() == a.keys()
    assert report.notes == ("only B has it, left out: extra.weight",)


def test_a_key_missing_in_c_is_no_difference(tmp_path: Path, out: Path) -> None:
    a, b, c = toys.toy(1), toys.toy(2), toys.toy(3)
    del c[toys.TO_K]
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate((a, b, c))]
    report = api.add_difference(*paths, output=out)
    assert torch.equal(load_file(out)[toys.TO_K], a[toys.TO_K])
    assert any("missing in C" in note for note in report.notes)


def test_position_ids_are_copied_or_rebuilt(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    _, got = merged(tmp_path, out, a, b, dtype="fp16")
    assert torch.equal(got[toys.POSITION_IDS], a[toys.POSITION_IDS])
    broken = {**a, toys.POSITION_IDS: a[toys.POSITION_IDS].half() * 0.999}
    report, got = merged(tmp_path, out, broken, b, overwrite=True)
    assert torch.equal(got[toys.POSITION_IDS], torch.arange(7).unsqueeze(0))
    assert any("position_ids" in note for note in report.notes)


def test_logit_scale_and_the_noise_schedule_are_copied(tmp_path: Path, out: Path) -> None:
    extra = {"logit_scale": torch.tensor(4.6), "alphas_cumprod": torch.rand(5)}
    a, b = {**toys.toy(1), **extra}, {**toys.toy(2), **{name: x * 2 for name, x in extra.items()}}
    _, got = merged(tmp_path, out, a, b, dtype="fp16")
    assert torch.equal(got["alphas_cumprod"], extra["alphas_cumprod"])
    assert got["logit_scale"].item() == torch.tensor(4.6).half().item()


def ema_of(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    unet = [name for name in tensors if name.startswith(toys.UNET)]
    source = torch.Generator().manual_seed(seed)
    plain = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in unet}
    return {ema: torch.randn(tensors[name].shape, generator=source).half() for name, ema in plain.items()}


def test_moving_averages_are_kept_dropped_or_used(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    ema_a, ema_b = ema_of(a, 3), ema_of(b, 4)
    key = "model_ema." + toys.TO_K.removeprefix("model.").replace(".", "")
    full_a = {**a, **ema_a, "model_ema.decay": torch.tensor(0.9999)}
    _, got = merged(tmp_path, out, full_a, {**b, **ema_b})
    assert torch.equal(got[key], ema_a[key])
    assert torch.equal(got[toys.TO_K], blend(a[toys.TO_K], b[toys.TO_K]))
    _, got = merged(tmp_path, out, full_a, {**b, **ema_b}, ema="drop", overwrite=True)
    assert not any(name.startswith("model_ema.") for name in got)
    report, got = merged(tmp_path, out, full_a, {**b, **ema_b}, ema="use", overwrite=True)
    assert got.keys() == a.keys()
    assert torch.equal(got[toys.TO_K], blend(ema_a[key], ema_b[key]))
    assert any("moving average" in note for note in report.notes)


def test_v_prediction_markers_survive(tmp_path: Path, out: Path) -> None:
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    report, got = merged(tmp_path, out, {**toys.toy(1), **markers}, {**toys.toy(2), **markers})
    assert {"v_pred", "ztsnr"} <= got.keys()
    assert report.notes == ()
    report, got = merged(tmp_path, out, toys.toy(1), {**toys.toy(2), **markers}, overwrite=True)
    assert "v_pred" not in got
    assert any("marker 'v_pred'" in note for note in report.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["a", "b"])
def test_nonfinite_inputs_are_refused(tmp_path: Path, out: Path, value: float, which: str) -> None:
    models = {"a": toys.toy(1), "b": toys.toy(2)}
    models[which][toys.TO_K][3, 2] = value
    with pytest.raises(NonFiniteInput, match=rf"{which}\.safetensors: '{toys.TO_K}'"):
        merged(tmp_path, out, models["a"], models["b"])
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".safetensors",)] == []
    assert not out.exists()
    report, got = merged(tmp_path, out, models["a"], models["b"], allow_nonfinite=True)
    assert int((~got[toys.TO_K].isfinite()).sum()) == 1
    assert sum(report.nonfinite.values()) == 1


def test_nonfinite_values_are_refused_in_copies_too(tmp_path: Path, out: Path) -> None:
    bad = toys.toy(1)
    bad[toys.TO_K][0, 0] = float("nan")
    path = toys.save(tmp_path / "bad.safetensors", bad)
    with pytest.raises(NonFiniteInput):
        api.convert(path, out)
    assert api.convert(path, out, allow_nonfinite=True).nonfinite


def test_overflow_is_refused_saturated_or_infinite(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    a[toys.TO_K][0, 0] = b[toys.TO_K][0, 0] = 60000.0
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate((a, b))]
    with pytest.raises(OutputOverflow, match="attn2.to_k"):
        api.weighted_sum(paths, weights=(1.0, 1.0), output=out)
    assert not out.exists()
    report = api.weighted_sum(paths, weights=(1.0, 1.0), output=out, overflow="saturate")
    assert load_file(out)[toys.TO_K][0, 0].item() == 65504
    assert report.overflowed == {toys.TO_K: 1}
    api.weighted_sum(paths, weights=(1.0, 1.0), output=out, overflow="inf", overwrite=True)
    assert load_file(out)[toys.TO_K][0, 0].item() == float("inf")
    api.weighted_sum(paths, weights=(1.0, 1.0), output=out, dtype="fp32", overwrite=True)
    assert load_file(out)[toys.TO_K][0, 0].item() == 120000


def test_scaled_fp8_is_multiplied_first(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2)
    stored = (a[toys.TO_K].float() * 64).to(torch.float8_e4m3fn)
    scale = torch.tensor(1 / 64)
    fp8 = {**a, toys.TO_K: stored, toys.TO_K.replace(".weight", ".scale_weight"): scale}
    fp8["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    report, got = merged(tmp_path, out, fp8, b)
    want = (0.5 * stored.double() / 64 + 0.5 * b[toys.TO_K].double()).half()
    assert torch.equal(got[toys.TO_K], want)
    assert got.keys() == a.keys()
    assert any("scale_weight" in note for note in report.notes)


def test_types_may_differ_between_models(tmp_path: Path, out: Path) -> None:
    a, b = toys.toy(1), toys.toy(2, torch.float32)
    report, got = merged(tmp_path, out, a, b)
    assert torch.equal(got[toys.TO_K], blend(a[toys.TO_K], b[toys.TO_K]))
    assert any("B holds F32 where A holds F16" in note for note in report.notes)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp8_e5m2", torch.float8_e5m2)):
        _, got = merged(tmp_path, out, a, b, dtype=name, overwrite=True)
        assert got[toys.TO_K].dtype == dtype


def test_integers_are_copied(tmp_path: Path, out: Path) -> None:
    _, got = merged(tmp_path, out, {**toys.toy(1), "step": torch.tensor(5)}, {**toys.toy(2), "step": torch.tensor(9)})
    assert got["step"].item() == 5


def test_the_vae_can_come_from_elsewhere(tmp_path: Path, out: Path) -> None:
    a, b, other = toys.toy(1), toys.toy(2), toys.toy(3, torch.float32)
    alone = {name.removeprefix(toys.VAE): x for name, x in other.items() if name.startswith(toys.VAE)}
    for tensors in (other, alone):
        vae = toys.save(tmp_path / "vae.safetensors", tensors)
        report, got = merged(tmp_path, out, a, b, vae=vae, overwrite=True)
        for name in toys.shapes():
            want = other[name].half() if name.startswith(toys.VAE) else blend(a[name], b[name])
            assert torch.equal(got[name], want), name
        assert any("VAE is taken from vae.safetensors" in note for note in report.notes)
    wrong = toys.save(tmp_path / "vae.safetensors", {**alone, "quant_conv.weight": torch.zeros(9, 9, 1, 1)})
    with pytest.raises(MismatchError, match="quant_conv"):
        merged(tmp_path, out, a, b, vae=wrong, overwrite=True)


def test_other_families_are_refused_before_anything_is_written(tmp_path: Path, out: Path) -> None:
    sd1 = toys.saved(tmp_path, "sd1", 1)
    prefix = toys.UNET
    sdxl = {
        name.replace("input_blocks.9.", "label_emb."): x for name, x in toys.toy(2).items() if "cond_stage" not in name
    }
    sdxl = {
        name: x
        for name, x in sdxl.items()
        if not any(f"{side}_blocks.{i}." in name for side in ("input", "output") for i in (9, 10, 11))
    }
    sdxl[prefix + "label_emb.0.0.weight"] = torch.zeros(32, 40)
    sdxl[prefix + "input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight"] = torch.zeros(8, 8)
    sdxl["conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.bias"] = torch.zeros(8)
    sdxl["conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"] = torch.zeros(6)
    other = toys.save(tmp_path / "sdxl.safetensors", sdxl)
    with pytest.raises(FamilyError, match="A is sd1 and B is sdxl"):
        api.weighted_sum([sd1, other], output=out)
    assert not out.exists()


def test_adapters_are_no_checkpoints(tmp_path: Path, out: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{key}.lora_down.weight": torch.zeros(4, 320), f"{key}.lora_up.weight": torch.zeros(320, 4)}
    path = toys.save(tmp_path / "lora.safetensors", lora)
    with pytest.raises(RequestError, match="is an adapter"):
        api.weighted_sum([path, path], output=out)
