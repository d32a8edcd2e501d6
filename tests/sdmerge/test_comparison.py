"""What differs between two models."""

from __future__ import annotations

import json
import math
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

import sdmerge
from sdformats.errors import FormatError
from sdmerge.errors import FamilyError, RequestError
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path

EMA = "model_ema." + (toys.TO_K.removeprefix("model.").replace(".", ""))


@pytest.fixture
def model() -> dict[str, Tensor]:
    return toys.toy(0)


def compared(folder: Path, a: dict[str, Tensor], b: dict[str, Tensor], *, ema: bool = False) -> sdmerge.Difference:
    paths = [toys.save(folder / f"{name}.safetensors", tensors) for name, tensors in (("a", a), ("b", b))]
    return sdmerge.diff(*paths, ema=ema)


def test_a_model_and_itself(tmp_path: Path, model: dict[str, Tensor]) -> None:
    found = compared(tmp_path, model, model)
    assert found.identical
    assert {one.status for one in found.tensors} == {"identical"}
    assert (found.total.measures.distance, found.total.measures.changed, found.family) == (0.0, 0, "sd1")
    assert found.most_changed(5) == ()
    assert found.total.measures.elements == sum(value.numel() for value in model.values())


def test_the_container_does_not_count(tmp_path: Path, model: dict[str, Tensor]) -> None:
    torch.save({"state_dict": model}, tmp_path / "b.ckpt")
    assert sdmerge.diff(toys.save(tmp_path / "a.safetensors", model), tmp_path / "b.ckpt").identical


def test_one_changed_tensor_is_found_and_placed(tmp_path: Path, model: dict[str, Tensor]) -> None:
    changed = {**model, toys.TO_K: model[toys.TO_K] * 2}
    found = compared(tmp_path, model, changed)
    assert not found.identical
    (one,) = found.most_changed(10)
    assert (one.name, one.component, one.block, one.status) == (toys.TO_K, "unet", "IN01", "changed")
    assert one.measures is not None
    assert one.measures.distance == pytest.approx(1.0, rel=1e-12)
    assert one.measures.cosine == pytest.approx(1.0, rel=1e-12)
    assert [block.block for block in found.blocks if block.tensors["changed"]] == ["IN01"]


def test_blocks_add_up_their_tensors(tmp_path: Path, model: dict[str, Tensor]) -> None:
    other = toys.toy(1)
    found = compared(tmp_path, model, other)
    names = [name for name in model if name.startswith(toys.UNET + "input_blocks.2.")]
    x, y = (np.concatenate([side[name].double().numpy().ravel() for name in names]) for side in (model, other))
    (block,) = [one for one in found.blocks if one.block == "IN02"]
    assert block.measures.distance == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert block.tensors["changed"] == len(names)
    keys = [(one.component, one.block) for one in found.blocks]
    assert keys[:3] == [("te1", "BASE"), ("unet", "IN00"), ("unet", "IN01")]
    assert keys[-2:] == [("unet", "OUT11"), ("vae", "VAE")]
    assert sum(one.measures.elements for one in found.blocks) == found.total.measures.elements


def test_most_changed_is_in_order_with_infinity_first(tmp_path: Path, model: dict[str, Tensor]) -> None:
    a = {**model, toys.UNET + "out.0.weight": torch.zeros(8, dtype=torch.float16)}
    found = compared(tmp_path, a, {**toys.toy(1), toys.POSITION_IDS: torch.zeros(1, 7, dtype=torch.int64)})
    most = found.most_changed(1000)
    distances = [one.measures.distance for one in most if one.measures]
    assert distances[0] == math.inf
    assert distances[-1] is None
    assert most[-1].name == toys.POSITION_IDS
    assert distances[:-1] == sorted(distances[:-1], reverse=True)  # type: ignore[type-var]
    assert found.most_changed(3) == most[:3]


def test_what_only_one_has_and_other_shapes(tmp_path: Path, model: dict[str, Tensor]) -> None:
    a = {**model, "v_pred": torch.zeros(1)}
    b = {**model, toys.CONV_IN: torch.zeros(8, 9, 3, 3, dtype=torch.float16), "ztsnr": torch.zeros(1)}
    found = compared(tmp_path, a, b)
    assert [one.name for one in found.with_status("only_a")] == ["v_pred"]
    assert [one.name for one in found.with_status("only_b")] == ["ztsnr"]
    (shape,) = found.with_status("shape")
    assert (shape.name, shape.measures) == (toys.CONV_IN, None)
    assert shape.a is not None
    assert shape.b is not None
    assert (shape.a.shape, shape.b.shape) == ((8, 4, 3, 3), (8, 9, 3, 3))
    assert not found.identical
    assert not any("output" in note for note in found.notes)
    assert any("inpainting" in note for note in found.notes)


def test_another_type_is_a_difference_even_where_values_are_equal(tmp_path: Path, model: dict[str, Tensor]) -> None:
    wide = {name: value.float() if value.is_floating_point() else value for name, value in model.items()}
    found = compared(tmp_path, model, wide)
    assert not found.identical
    assert found.total.tensors["changed"] == 0
    assert found.total.measures.distance == 0
    assert any("B holds F32 where A holds F16; compared by value" in note for note in found.notes)


def test_ema_is_compared_only_where_asked(tmp_path: Path, model: dict[str, Tensor]) -> None:
    a, b = {**model, EMA: torch.zeros(8, 6)}, {**model, EMA: torch.ones(8, 6)}
    plain = compared(tmp_path, a, b)
    assert plain.identical
    assert any("model_ema" in note for note in plain.notes)
    found = compared(tmp_path, a, b, ema=True)
    (one,) = found.most_changed(5)
    assert (one.name, one.component, one.block) == (EMA, "ema", "EMA")
    assert found.blocks[-1].block == "EMA"


def test_fp8_factors_are_multiplied_and_the_rest_is_told(tmp_path: Path, model: dict[str, Tensor]) -> None:
    stem = toys.TO_K.removesuffix(".weight")
    half = model[toys.TO_K].to(torch.float8_e4m3fn)
    b = {**model, toys.TO_K: half, stem + ".scale_weight": torch.tensor(4.0), stem + ".scale_input": torch.tensor(1.0)}
    b["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    found = compared(tmp_path, {**model, toys.TO_K: (half.float() * 4).half()}, b)
    assert found.total.tensors["changed"] == 0
    assert set(found.total.tensors) == {"identical"}
    assert sum("scale" in note for note in found.notes) == 2
    assert any("scale_input" in note and "not compared" in note for note in found.notes)


def test_nan_is_counted_and_left_out(tmp_path: Path, model: dict[str, Tensor]) -> None:
    broken = model[toys.TO_K].clone()
    broken[0, 0] = math.nan
    found = compared(tmp_path, model, {**model, toys.TO_K: broken})
    (one,) = found.most_changed(5)
    assert one.measures is not None
    assert (one.measures.changed, one.measures.nonfinite, one.measures.distance) == (1, 1, 0.0)


def test_json_has_no_numbers_that_json_has_not(tmp_path: Path, model: dict[str, Tensor]) -> None:
    a = {**model, toys.UNET + "out.0.weight": torch.zeros(8, dtype=torch.float16)}
    data = json.loads(json.dumps(compared(tmp_path, a, toys.toy(1)).as_dict(), allow_nan=False))
    (one,) = [entry for entry in data["tensors"] if entry["name"] == toys.UNET + "out.0.weight"]
    assert one["status"] == "changed"
    assert (one["distance"], one["norm_a"], one["changed_elements"]) == (None, 0.0, 8)
    assert one["norm_b"] == one["norm_difference"] > 0
    assert one["a"] == {"dtype": "F16", "shape": [8]}
    assert data["total"]["tensors"]["changed"] == len(model) - 1


def test_any_number_of_threads_gives_the_same(tmp_path: Path) -> None:
    paths = [toys.saved(tmp_path, name, seed) for seed, name in enumerate("ab")]
    assert sdmerge.diff(*paths, threads=1).as_dict() == sdmerge.diff(*paths, threads=8).as_dict()


def test_models_that_merging_refuses_are_refused(tmp_path: Path, model: dict[str, Tensor]) -> None:
    a = toys.save(tmp_path / "a.safetensors", model)
    vae = {"decoder.up_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
    spelled = toys.save(tmp_path / "vae.safetensors", vae)
    with pytest.raises(FamilyError, match="no tensor in common"):
        sdmerge.diff(a, spelled)
    with pytest.raises(FormatError, match="family"):
        sdmerge.diff(a, a, family="sd9")
    with pytest.raises(RequestError, match="threads"):
        sdmerge.diff(a, a, threads=0)


def test_adapters_are_compared_with_adapters_only(tmp_path: Path, model: dict[str, Tensor]) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{stem}.lora_{way}.weight": torch.ones(4, 4) for way in ("down", "up")} | {
        f"{stem}.alpha": torch.tensor(4.0)
    }
    a = toys.save(tmp_path / "a.safetensors", lora)
    b = toys.save(tmp_path / "b.safetensors", {**lora, f"{stem}.alpha": torch.tensor(8.0)})
    found = sdmerge.diff(a, b)
    assert [one.name for one in found.most_changed(5)] == [f"{stem}.alpha"]
    assert any("factor by factor" in note for note in found.notes)
    with pytest.raises(RequestError, match="adapter"):
        sdmerge.diff(a, toys.save(tmp_path / "m.safetensors", model))
    with pytest.raises(FamilyError, match="no tensor in common"):
        sdmerge.diff(
            a, toys.save(tmp_path / "c.safetensors", {n.replace("attn1", "attn2"): v for n, v in lora.items()})
        )


def test_names_of_no_family_are_grouped_by_their_first_number(tmp_path: Path) -> None:
    tensors = {"net.0.a": torch.ones(2), "net.0.b": torch.ones(2), "net.1.a": torch.ones(2), "head": torch.ones(2)}
    found = compared(tmp_path, tensors, {**tensors, "net.1.a": torch.zeros(2)})
    assert {one.block: one.tensors["changed"] for one in found.blocks} == {"net.0": 0, "net.1": 1, "rest": 0}
    many = {f"net.{i}.a": torch.ones(1) for i in range(300)}
    assert [one.block for one in compared(tmp_path, many, many).blocks] == ["all"]


def test_checksums_are_looked_at(tmp_path: Path, model: dict[str, Tensor]) -> None:
    path = tmp_path / "b.ckpt"
    torch.save(model, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0)
        start = entry.header_offset + 30 + int.from_bytes(data[entry.header_offset + 26 :][:2], "little")
        start += int.from_bytes(data[entry.header_offset + 28 :][:2], "little")
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError):
        sdmerge.diff(toys.save(tmp_path / "a.safetensors", model), path)
