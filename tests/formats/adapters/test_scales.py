"""What every change is multiplied with: alpha, the metadata, PEFT's settings, or nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdformats.adapters.records import OFT, LoRA
from sdformats.errors import CorruptFile, FormatError, UnsupportedFile
from tests.formats.adapters import samples
from tests.formats.adapters.samples import PEFT, noise, pair, pairs, read, refusal, save, save_peft

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.adapters.record import Record

Q, K = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"
KOHYA_Q = "lora_unet_" + Q.replace(".", "_")
LAYER = "text_model.encoder.layers.0.mlp.fc1"
KEY = "lora_adapter_metadata"


def scales(records: dict[str, Record] | Any) -> list[float]:
    return [record.scale for record in records.values()]


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(None, 1.0), (torch.tensor(0.0), 1.0), (torch.tensor(1.0), 0.5), (torch.tensor(8.0), 4.0)]
    + [(torch.tensor(3.0, dtype=dtype), 1.5) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    + [(torch.tensor([3.0]), 1.5), (torch.tensor(3), 1.5)],
)
def test_alpha_over_rank_is_the_scale_and_none_or_0_is_1(alpha: Any, scale: float, tmp_path: Path) -> None:
    tensors = pair(KOHYA_Q) | ({} if alpha is None else {f"{KOHYA_Q}.alpha": alpha})
    assert scales(read(save(tmp_path / "a.safetensors", tensors))[0].modules) == [scale]


@pytest.mark.parametrize("metadata", [{"ss_network_alpha": "1", "ss_network_dim": "2"}, {"ss_network_dim": "Dynamic"}])
def test_a_trainer_s_metadata_never_decide_the_scale(metadata: dict[str, str], tmp_path: Path) -> None:
    assert scales(read(save(tmp_path / "a.safetensors", pair(KOHYA_Q), metadata))[0].modules) == [1.0]


def test_a_plain_scale_stands_for_alpha_over_rank(tmp_path: Path) -> None:
    tensors = pair(KOHYA_Q) | {f"{KOHYA_Q}.scale": torch.tensor(0.25)}
    assert scales(read(save(tmp_path / "a.safetensors", tensors))[0].modules) == [0.25]


def test_hcp_s_alpha_is_divided_already(tmp_path: Path) -> None:
    tensors = pair(Q, ends=("___.layer.W_down", "___.layer.W_up")) | {f"{Q}.___.alpha": torch.tensor(0.25)}
    assert scales(read(save(tmp_path / "a.safetensors", tensors))[0].modules) == [0.25]


def test_an_oft_s_alpha_is_its_constraint(tmp_path: Path) -> None:
    tensors = {f"oft_unet_{Q.replace('.', '_')}.{end}": t for end, t in (("oft_blocks", noise(2, 2, 2)),)}
    tensors |= {f"oft_unet_{Q.replace('.', '_')}.alpha": torch.tensor(0.5)}
    (record,) = read(save(tmp_path / "a.safetensors", tensors))[0].modules.values()
    assert isinstance(record, OFT)
    assert (record.constraint, record.scale) == (0.5, 1.0)


@pytest.mark.parametrize("alpha", [4.0, float("inf")])
def test_a_kronecker_product_of_whole_factors_ignores_alpha(alpha: float, tmp_path: Path) -> None:
    tensors = {f"{KOHYA_Q}.lokr_w1": noise(2, 2), f"{KOHYA_Q}.lokr_w2": noise(2, 2)}
    path = save(tmp_path / "a.safetensors", tensors | {f"{KOHYA_Q}.alpha": torch.tensor(alpha, dtype=torch.float16)})
    assert scales(read(path)[0].modules) == [1.0]


@pytest.mark.parametrize("alpha", [float("inf"), float("nan")])
def test_an_alpha_that_is_no_number_is_an_error(alpha: float, tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.safetensors", pair(KOHYA_Q, alpha=alpha)), CorruptFile)
    assert KOHYA_Q in text
    assert str(alpha) in text


def test_an_alpha_of_several_numbers_is_an_error(tmp_path: Path) -> None:
    tensors = pair(KOHYA_Q) | {f"{KOHYA_Q}.alpha": noise(2)}
    assert "expected one number" in refusal(save(tmp_path / "a.safetensors", tensors), CorruptFile)


def diffusers(path: Path, told: Any, modules: tuple[str, ...] = (f"unet.{Q}", f"unet.{K}")) -> Path:
    return save(
        path / "a.safetensors", pairs(*modules, ends=PEFT), {KEY: told if isinstance(told, str) else json.dumps(told)}
    )


def test_diffusers_metadata_tell_the_scale_of_each_module(tmp_path: Path) -> None:
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {K: 1}}
    adapter, _ = read(diffusers(tmp_path, told))
    assert scales(adapter.modules) == [2.0, 0.5]
    assert KEY not in adapter.metadata


def test_diffusers_files_without_metadata_have_the_scale_1(tmp_path: Path) -> None:
    assert scales(read(save(tmp_path / "a.safetensors", pair(f"unet.{Q}", ends=PEFT)))[0].modules) == [1.0]


def test_settings_of_one_component_leave_the_others_alone(tmp_path: Path) -> None:
    told = {"text_encoder.r": 2, "text_encoder.lora_alpha": 4}
    adapter, _ = read(diffusers(tmp_path, told, (f"unet.{Q}", f"text_encoder.{LAYER}")))
    assert {path: record.scale for path, record in adapter.modules.items()} == {f"unet.{Q}": 1.0, f"te1.{LAYER}": 2.0}


@pytest.mark.parametrize("spelled", [LAYER, LAYER.removeprefix("text_model.")])
@pytest.mark.parametrize("told", [LAYER, LAYER.removeprefix("text_model.")])
def test_patterns_fit_a_text_encoder_in_both_dialects(spelled: str, told: str, tmp_path: Path) -> None:
    settings = {"text_encoder.r": 8, "text_encoder.lora_alpha": 8}
    settings |= {"text_encoder.rank_pattern": {told: 2}, "text_encoder.alpha_pattern": {told: 1}}
    adapter, _ = read(diffusers(tmp_path, settings, (f"text_encoder.{spelled}",)))
    assert scales(adapter.modules) == [0.5]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("{", "no JSON"),
        ("[]", "no object"),
        ({"unet.r": "2", "unet.lora_alpha": 2}, "expected a number"),
        ({"unet.r": 2}, "lora_alpha"),
        ({"unet.r": 3, "unet.lora_alpha": 2}, "the rank 2"),
        ({"unet.r": 2, "unet.lora_alpha": float("inf")}, "alpha inf"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": [1]}, "rank_pattern"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(a+)+": 1}}, "(a+)+"),
    ],
)
def test_metadata_that_do_not_fit_are_an_error(told: Any, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(diffusers(tmp_path, told))


def peft(folder: Path, **config: Any) -> Path:
    return save_peft(folder / "a", pairs(*(f"base_model.model.{name}" for name in (Q, K)), ends=PEFT), **config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1.0, 1.0]),
        ({"lora_alpha": 1}, [0.5, 0.5]),
        ({"lora_alpha": 2, "use_rslora": True}, [2**0.5, 2**0.5]),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, [1.0, 4.0]),
        ({"lora_alpha": 8, "alpha_pattern": {"tn1.to_q": 2}}, [4.0, 4.0]),
        ({"lora_alpha": 8, "alpha_pattern": {f"^{K}$": 4}}, [4.0, 2.0]),
        ({"r": 16, "rank_pattern": {"to_q": 2, K.replace(".", r"\."): 2}, "lora_alpha": 1}, [0.5, 0.5]),
    ],
)
def test_peft_s_settings_tell_the_scale(config: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    assert scales(read(peft(tmp_path, **config))[0].modules) == pytest.approx(expected, rel=1e-15)


def test_peft_s_settings_may_be_given(tmp_path: Path) -> None:
    folder = peft(tmp_path, lora_alpha=1)
    config = (folder / "adapter_config.json").rename(tmp_path / "other.json")
    assert scales(read(folder / "adapter_model.safetensors", config)[0].modules) == [0.5, 0.5]


def test_a_peft_file_without_its_settings_has_no_known_scale_and_says_so(tmp_path: Path) -> None:
    folder = peft(tmp_path)
    (folder / "adapter_config.json").unlink()
    adapter, layout = read(folder / "adapter_model.safetensors")
    assert layout.name == "peft"
    assert not adapter.scaled
    assert any("adapter_config.json" in note for note in adapter.notes)


def test_folders_of_several_components_have_settings_of_their_own(tmp_path: Path) -> None:
    save_peft(tmp_path / "a" / "unet", pair(f"base_model.model.{Q}", ends=PEFT), lora_alpha=1)
    save_peft(tmp_path / "a" / "text_encoder", pair(f"base_model.model.{LAYER}", ends=PEFT), lora_alpha=4)
    adapter, layout = read(tmp_path / "a")
    assert layout.name == "peft"
    assert {path: record.scale for path, record in adapter.modules.items()} == {f"unet.{Q}": 0.5, f"te1.{LAYER}": 2.0}


@pytest.mark.parametrize("end", ["weight", "default.weight"])
def test_named_adapters_of_peft_are_read(end: str, tmp_path: Path) -> None:
    ends = (f"lora_A.{end}", f"lora_B.{end}")
    adapter, _ = read(save_peft(tmp_path / "a", pair(f"base_model.model.{Q}", ends=ends), lora_alpha=1))
    assert scales(adapter.modules) == [0.5]


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_peft_s_lengths_are_one_for_each_row(end: str, tmp_path: Path) -> None:
    tensors = pair(f"base_model.model.{Q}", ends=PEFT, out=6) | {f"base_model.model.{Q}.{end}": noise(6)}
    (record,) = read(save_peft(tmp_path / "a", tensors))[0].modules.values()
    assert isinstance(record, LoRA)
    assert record.magnitude is not None
    assert (record.magnitude.axis, record.magnitude.values.shape) == ("out", (6, 1))


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ({"peft_type": "VERA"}, UnsupportedFile, "VERA"),
        ({"r": 4}, CorruptFile, "rank"),
        ({"lora_alpha": None}, CorruptFile, "lora_alpha"),
        ({"lora_alpha": True}, CorruptFile, "lora_alpha"),
        ({"alpha_pattern": {".*to_q": 1}}, UnsupportedFile, ".*to_q"),
    ],
)
def test_settings_that_do_not_fit_are_an_error(
    config: dict[str, Any], kind: type[FormatError], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        read(peft(tmp_path, **config))
    assert expected in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_settings_that_are_no_object_are_an_error(text: str, tmp_path: Path) -> None:
    folder = peft(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CorruptFile, match="adapter_config"):
        read(folder)


def test_layouts_without_a_scale_have_the_scale_1(tmp_path: Path) -> None:
    xlabs = pair("double_blocks.0.processor.proj_lora1", ends=("down.weight", "up.weight"))
    assert scales(read(save(tmp_path / "a.safetensors", xlabs))[0].modules) == [1.0]
    flux = pair("transformer.single_transformer_blocks.0.proj_mlp", ends=PEFT)
    assert scales(read(save(tmp_path / "b.safetensors", flux))[0].modules) == [1.0]
    listed = read(samples.save_list(tmp_path / "c.pt", samples.numbered()))[0]
    assert set(scales(listed.modules)) == {1.0}
