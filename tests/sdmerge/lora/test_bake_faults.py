"""Baking: what does not belong into a model is refused, faults are told, and native code makes what torch makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdkernels import native
from sdmerge.errors import FamilyError, MismatchError, NonFiniteInput, SdmergeError
from tests.sdmerge import toys
from tests.sdmerge.lora.test_bake import CONV1, FC1, MODEL_CONV1, MODEL_TO_Q, TO_Q, lora, product, save

if TYPE_CHECKING:
    from pathlib import Path

    from sdkernels.native import Library


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_native_code_and_torch_agree(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    """Their sums have another order, so results that lie between two steps may go either way, seldom."""
    model = toys.save(tmp_path / "model.safetensors", toys.toy(1, torch.float32))
    adapters = [
        save(tmp_path / f"{i}.safetensors", lora(TO_Q, 8, 8, seed=i) | lora(CONV1, 8, 8, 3, 3, seed=i)) for i in (1, 2)
    ]
    found = []
    for chosen in (None, library):
        monkeypatch.setattr(native, "LIBRARY", chosen)
        sdmerge.bake(model, adapters, output=tmp_path / "out.safetensors", dtype=dtype, overwrite=True)
        found.append(load_file(tmp_path / "out.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want)
        assert want.dtype == torch.float32 or (found[1][name] != want).float().mean() <= 0.02


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("output", ["keep", "fp16", "fp32"])
@pytest.mark.parametrize("chance", [None, 3])
def test_a_model_in_fp8(dtype: torch.dtype, output: str, chance: int | None, tmp_path: Path) -> None:
    model = {name: x.to(dtype) if x.dim() > 1 else x for name, x in toys.toy(1, torch.float16).items()}
    change = lora(TO_Q, 8, 8) | lora(CONV1, 8, 8, 3, 3)
    base, adapter = save(tmp_path / "m.safetensors", model), save(tmp_path / "l.safetensors", change)
    sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", dtype=output, stochastic_rounding=chance)
    got = load_file(tmp_path / "out.safetensors")
    for name, module in ((MODEL_TO_Q, TO_Q), (MODEL_CONV1, CONV1)):
        exact = model[name].double() + product(change, module).reshape(model[name].shape)
        wanted = {"keep": dtype, "fp16": torch.float16, "fp32": torch.float32}[output]
        assert got[name].dtype == wanted
        step = torch.finfo(wanted).eps * exact.abs() + 0.01 * (wanted.itemsize == 1)  # subnormals
        assert ((got[name].double() - exact).abs() <= (0.51 if chance is None else 1) * step + 1e-6).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65504.0])
def test_native_code_finds_the_same_faults(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    tensors = toys.toy(1, torch.float16)
    tensors[MODEL_TO_Q][3, 5] = value
    model = toys.save(tmp_path / "model.safetensors", tensors)
    change = lora(TO_Q, 8, 8)
    change[f"{TO_Q}.lora_up.weight"].fill_(1000)
    change[f"{TO_Q}.lora_down.weight"].fill_(1)
    adapter = save(tmp_path / "lora.safetensors", change)
    told, written, out = [], [], tmp_path / "out.safetensors"
    for chosen in (None, library):
        monkeypatch.setattr(native, "LIBRARY", chosen)
        with pytest.raises(SdmergeError, match=MODEL_TO_Q) as error:
            sdmerge.bake(model, [adapter], output=out)
        assert not out.exists()
        told.append(str(error.value))
        for overflow in ("saturate", "inf"):
            report = sdmerge.bake(model, [adapter], output=out, overwrite=True, overflow=overflow, allow_nonfinite=True)
            numbers = load_file(out)[MODEL_TO_Q].nan_to_num(nan=12345.0)  # NaN has many bits
            written.append((numbers.tolist(), report.nonfinite, report.overflowed))
        out.unlink()
    assert told[0] == told[1]
    assert written[:2] == written[2:]


def test_modules_without_a_place_are_named(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    missing = "lora_te_text_model_encoder_layers_9_mlp_fc1"
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8) | lora(missing, 24, 6))
    with pytest.raises(
        MismatchError, match=r"no place for 1 of the 2 modules of .*l\.safetensors: te1\.text_model.*layers\.9"
    ):
        sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    without = sdmerge.Weights(value=1.0, te=0.0)
    report = sdmerge.bake(base, [(adapter, without)], output=tmp_path / "out.safetensors")
    assert "L1: 1 of 2 modules baked into A" in report.notes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("end", ["up", "down"])
@pytest.mark.parametrize("native_code", [True, False])
def test_faults_of_an_adapter_are_its_own(
    value: float, end: str, native_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    monkeypatch.setattr(native, "LIBRARY", library if native_code else None)
    base = toys.saved(tmp_path, "a", 1)
    change = lora(TO_Q, 8, 8)
    change[f"{TO_Q}.lora_{end}.weight"][1, 1] = value
    adapter = save(tmp_path / "broken.safetensors", change)
    for overflow in ("refuse", "saturate"):
        with pytest.raises(NonFiniteInput, match=rf"broken\.safetensors: '{TO_Q}\.lora_{end}\.weight'.*1 elements"):
            sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", overflow=overflow)
    report = sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", allow_nonfinite=True)
    assert report.nonfinite == {f"{adapter}: '{TO_Q}.lora_{end}.weight'": 1}
    assert not report.overflowed
    assert not load_file(tmp_path / "out.safetensors")[MODEL_TO_Q].isfinite().all()


@pytest.mark.parametrize(
    ("module", "tensors", "said"),
    [
        (
            TO_Q,
            {"hada_w1_a": (8, 2), "hada_w1_b": (2, 9), "hada_w2_a": (8, 2), "hada_w2_b": (2, 9)},
            "8 columns.* has 9",
        ),
        (TO_Q, {"lokr_w1": (2, 3), "lokr_w2": (4, 3)}, "8 columns.* has 9"),
        (TO_Q, {"diff": (8, 9)}, "8 columns.* has 9"),
        (FC1, {"diff_b": (9,)}, "24 rows.* has 9"),
    ],
)
def test_every_algorithm_must_fit(module: str, tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    adapter = save(tmp_path / "l.safetensors", {f"{module}.{end}": torch.ones(shape) for end, shape in tensors.items()})
    with pytest.raises(MismatchError, match=said) as error:
        sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", family="sd1")
    assert "l.safetensors" in str(error.value)


@pytest.mark.parametrize(("out", "inner", "said"), [(9, 8, "has 8 rows"), (8, 7, "has 8 columns")])
def test_another_size_is_refused_before_anything_is_written(out: int, inner: int, said: str, tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, out, inner))
    with pytest.raises(MismatchError, match=said):
        sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "l.safetensors"]


def test_another_family_is_refused(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    names = [f"lora_unet_input_blocks_4_1_transformer_blocks_{n}_attn2_to_k" for n in (0, 1)]
    adapter = save(tmp_path / "l.safetensors", lora(names[0], 8, 2048) | lora(names[1], 8, 2048))
    with pytest.raises(FamilyError, match=r"l\.safetensors: is for sdxl \(expected one for sd1"):
        sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors")
