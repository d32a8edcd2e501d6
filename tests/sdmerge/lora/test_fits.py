"""An adapter for a weight of another size is told before anything is computed, with file and module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import sdmerge
from sdmerge.errors import FamilyError, MismatchError
from sdmerge.lora.fits import check_fits
from tests.sdmerge.lora import families, lycoris_cases, samples
from tests.sdmerge.lora.records import record_of

if TYPE_CHECKING:
    from pathlib import Path

LINEAR, CONV = (16, 36), (16, 36, 3, 3)
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("name", [*lycoris_cases.CASES, "ia3", "norm"])
def test_rows_and_columns_are_those_of_the_weight(name: str) -> None:
    if name == "ia3":
        shape: tuple[int, ...] = LINEAR
        tensors = {"weight": torch.ones(36), "on_input": torch.tensor(1.0)}
    elif name == "norm":
        shape, tensors = (16,), {"w_norm": torch.ones(16), "b_norm": torch.ones(16)}
    else:
        _, layer, tensors = lycoris_cases.made(name)
        assert isinstance(layer.weight, torch.Tensor)
        shape = tuple(layer.weight.shape)
    record = record_of(tensors)
    check_fits("unet.conv_in", record, shape, "w")
    if name != "ia3":
        with pytest.raises(MismatchError, match=r"'w': has 32 rows, and unet\.conv_in of memory has 16 \(expected"):
            check_fits("unet.conv_in", record, (32, *shape[1:]), "w")
    if "oft" not in name and name != "norm":
        with pytest.raises(MismatchError, match=r"'w': has \d+ (columns|inputs), and unet\.conv_in of memory has \d+"):
            check_fits("unet.conv_in", record, (16, 37, *shape[2:]), "w")


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lengths_of_columns_are_counted(shape: tuple[int, ...]) -> None:
    ones = (1,) * len(shape[2:])
    factors = {"lora_up.weight": torch.ones(16, 2, *ones), "lora_down.weight": torch.ones(2, *shape[1:])}
    check_fits("m", record_of(factors | {"dora_scale": torch.ones(1, 36, *ones)}), shape, "w")
    with pytest.raises(MismatchError, match="has 36 inputs, and m of memory has 37"):
        check_fits("m", record_of(factors | {"dora_scale": torch.ones(1, 37, *ones)}), shape, "w")


def test_rotations_of_columns_are_counted() -> None:
    for count in (1, 9):
        check_fits("m", record_of({"oft_R.weight": torch.ones(count, 6)}), LINEAR, "w")
    with pytest.raises(MismatchError, match="has 36 columns, and m of memory has 32"):
        check_fits("m", record_of({"oft_R.weight": torch.ones(8, 6)}), LINEAR, "w")
    with pytest.raises(MismatchError, match="has 36 columns, and m of memory has 35"):
        check_fits("m", record_of({"oft_R.weight": torch.ones(1, 10)}), LINEAR, "w")


def test_differences_from_another_model_are_refused(tmp_path: Path) -> None:
    base = families.single(tmp_path / "sd1.safetensors", "sd1", families.tensors("sd1", torch.float32))

    def convert(tensors: dict[str, torch.Tensor], **texts: str) -> None:
        lora = samples.saved(tmp_path / "lora.safetensors", tensors, **texts)
        sdmerge.convert(lora, tmp_path / "out.safetensors", to="lycoris", form="full", base=base)

    def factors(module: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{module}.lora_up.weight": torch.ones(size, 2), f"{module}.lora_down.weight": torch.ones(2, size)}

    with pytest.raises(
        MismatchError, match=r"attn1\.to_q.weight': has 8 rows, and unet.*to_q of .*lora\.safetensors has 16"
    ):
        convert(factors(Q, 16) | {f"{Q}.dora_scale": torch.ones(16, 1)})
    with pytest.raises(FamilyError, match=r"sd1\.safetensors: is sd1, and the adapter is for sdxl"):
        convert(factors(Q, 8), ss_base_model_version="sdxl_base_v1-0")
    with pytest.raises(
        MismatchError, match="no place for 1 of the adapter's 1 modules: te1.*layers.9.*expected the model"
    ):
        convert(factors("lora_te_text_model_encoder_layers_9_mlp_fc1", 8))
    assert not (tmp_path / "out.safetensors").exists()
