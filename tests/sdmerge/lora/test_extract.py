"""Extraction: what one model changed over another comes back as a LoRA, and only that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdmerge
from sdformats.adapters import open_adapter
from sdformats.adapters.errors import CannotHold
from sdformats.files import open_source
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from tests.sdmerge import toys
from tests.sdmerge.lora import families
from tests.sdmerge.lora.records import numbers

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.views import Ref

Tensors = dict[str, Tensor]
TO_Q = toys.UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = toys.UNET + "input_blocks.1.0.in_layers.2.weight"
FC1 = toys.TE + "encoder.layers.0.mlp.fc1.weight"
NORM = toys.UNET + "out.0.weight"
BIAS = toys.UNET + "input_blocks.0.0.bias"
PATHS = {
    TO_Q: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "unet.down_blocks.0.resnets.0.conv1",
    FC1: "te1.text_model.encoder.layers.0.mlp.fc1",
}


def double(ref: Ref) -> Tensor:
    """Return a tensor in float64."""
    return value(ref).double()


def low_rank(shape: torch.Size, rank: int, seed: int, scale: float = 0.1) -> Tensor:
    """Return a change of a rank."""
    source = torch.Generator().manual_seed(seed)
    columns = shape.numel() // shape[0]
    made = torch.randn(shape[0], rank, generator=source) @ torch.randn(rank, columns, generator=source)
    return (made * scale).reshape(shape)


def models(folder: Path, rank: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Tensors]:
    """Write a base and a model that changed three of its layers by `rank`; return them and the changes."""
    base = toys.toy(1, dtype)
    changes = {name: low_rank(base[name].shape, rank, seed) for seed, name in enumerate(PATHS)}
    tuned = {name: (t + changes[name]).to(dtype) if name in changes else t for name, t in base.items()}
    return toys.save(folder / "tuned.safetensors", tuned), toys.save(folder / "base.safetensors", base), changes


def extracted(path: Path) -> dict[str, Tensor]:
    """Return the change of each module of an adapter."""
    with open_source(path) as source:
        adapter, _ = open_adapter(source)
        return {name: delta(record, double) for name, record in adapter.modules.items()}


def test_a_change_of_that_rank_comes_back(tmp_path: Path) -> None:
    tuned, base, changes = models(tmp_path)
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, dtype="fp32", family="sd1")
    found = extracted(tmp_path / "l.safetensors")
    assert found.keys() == set(PATHS.values())
    for name, path in PATHS.items():
        expected = changes[name].double().flatten(1)
        assert (found[path].flatten(1) - expected).norm() <= 1e-5 * expected.norm()


def test_bake_extract_bake_gives_the_model_back(tmp_path: Path) -> None:
    """Within twice the rounding of the model's type."""
    tuned, base, _ = models(tmp_path, dtype=torch.float16)
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, dtype="fp32", family="sd1")
    sdmerge.bake(base, [tmp_path / "l.safetensors"], output=tmp_path / "again.safetensors")
    before, after = load_file(tuned), load_file(tmp_path / "again.safetensors")
    for name, tensor in before.items():
        step = tensor.double().abs().clamp(min=2.0**-14) * 2.0**-10
        assert bool(((after[name].double() - tensor.double()).abs() <= 2 * step + 4e-3).all()), name
        error = (after[name].double() - tensor.double()).norm()
        assert error <= 2 * (tensor.double().abs() * 2.0**-11).norm() + 1e-6, name


def test_truncation_is_the_best_of_its_rank(tmp_path: Path) -> None:
    tuned, base, _changes = models(tmp_path, rank=6)
    report = tmp_path / "r.json"
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=3, dtype="fp32", report=report, family="sd1")
    found, told = extracted(tmp_path / "l.safetensors"), json.loads(report.read_text())
    for name, path in PATHS.items():
        change = (load_file(tuned)[name] - load_file(base)[name]).double().flatten(1)
        tail = torch.linalg.svdvals(change)[3:].norm()
        error = (found[path].flatten(1) - change).norm()
        assert error <= tail * 1.001 + 1e-6
        assert told["layers"][path]["rank"] == 3
        assert told["layers"][path]["error"] == pytest.approx(float(error / change.norm()), abs=1e-4)
        assert told["layers"][path]["excess_at_most"] <= 0.01


def test_rounding_alone_is_left_out_and_named(tmp_path: Path) -> None:
    exact = {name: t.float() if t.is_floating_point() else t for name, t in toys.toy(1, torch.float32).items()}
    base = toys.save(tmp_path / "base.safetensors", exact)
    rounded = {name: t.half() if t.is_floating_point() else t for name, t in exact.items()}
    rounded[TO_Q] = (exact[TO_Q] + low_rank(exact[TO_Q].shape, 1, 0)).half()
    tuned = toys.save(tmp_path / "tuned.safetensors", rounded)
    report = tmp_path / "r.json"
    done = sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=4, report=report, family="sd1")[0]
    assert list(extracted(tmp_path / "l.safetensors")) == [PATHS[TO_Q]]
    assert any("rounding of the files' types" in note for note in done.notes)
    assert json.loads(report.read_text())["left_out"][PATHS[CONV]] == "rounding"


def test_a_real_change_of_one_step_is_none_of_rounding(tmp_path: Path) -> None:
    base = toys.toy(1)
    steps = base[TO_Q].view(torch.int16) + 8
    tuned = base | {TO_Q: steps.view(torch.float16)}
    files = [toys.save(tmp_path / f"{n}.safetensors", t) for n, t in (("t", tuned), ("b", base))]
    sdmerge.extract_lora(files[0], files[1], tmp_path / "l.safetensors", rank=8, family="sd1")
    assert list(extracted(tmp_path / "l.safetensors")) == [PATHS[TO_Q]]


def test_a_size_is_kept_and_no_worse_than_a_fixed_rank(tmp_path: Path) -> None:
    base = toys.toy(1, torch.float32)
    source = torch.Generator().manual_seed(5)
    changed = [name for name, t in base.items() if t.dim() > 1 and name.startswith(toys.UNET) and "time" not in name]
    tuned = dict(base)
    for i, name in enumerate(changed):
        tuned[name] = base[name] + torch.randn(base[name].shape, generator=source) * 0.01 * (1 + i % 5)
    files = [toys.save(tmp_path / f"{n}.safetensors", t) for n, t in (("t", tuned), ("b", base))]
    fixed, sized = tmp_path / "fixed.safetensors", tmp_path / "sized.safetensors"
    reports = [tmp_path / "fixed.json", tmp_path / "sized.json"]
    sdmerge.extract_lora(*files, fixed, rank=2, report=reports[0], family="sd1")
    size = fixed.stat().st_size
    also = tmp_path / "also.safetensors"
    sdmerge.extract_lora(*files, sized, size=size, also={also: size * 4 // 5}, report=reports[1], family="sd1")
    assert sized.stat().st_size <= size
    assert also.stat().st_size <= size * 4 // 5
    errors = [json.loads(path.read_text())["error"] for path in reports]
    assert errors[1] <= errors[0] * 0.98
    assert set(extracted(also)) <= set(extracted(sized))


@pytest.mark.parametrize("bound", [{"energy": 0.9}, {"error": 0.3}])
def test_energy_and_error_hold_for_each_layer(bound: dict[str, float], tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=6)
    report = tmp_path / "r.json"
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", **bound, report=report, family="sd1")
    for one in json.loads(report.read_text())["layers"].values():
        assert one["energy"] >= bound.get("energy", 0) - 1e-4
        assert one["error"] <= bound.get("error", 1) + 1e-4


def test_convolutions_may_have_a_rank_of_their_own(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=6)
    report = tmp_path / "r.json"
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=4, conv_rank=1, report=report, family="sd1")
    ranks = {path: one["rank"] for path, one in json.loads(report.read_text())["layers"].items()}
    assert ranks == {PATHS[TO_Q]: 4, PATHS[CONV]: 1, PATHS[FC1]: 4}


def test_norms_and_biases_go_where_the_layout_has_a_place(tmp_path: Path) -> None:
    base = toys.toy(1, torch.float32)
    tuned = base | {NORM: base[NORM] + 1, BIAS: base[BIAS] + 2, toys.CONV_IN: base[toys.CONV_IN] + 0.5}
    files = [toys.save(tmp_path / f"{n}.safetensors", t) for n, t in (("t", tuned), ("b", base))]
    report = sdmerge.extract_lora(*files, tmp_path / "k.safetensors", rank=1, family="sd1")[0]
    assert any("its norm changed, which kohya cannot hold" in note for note in report.notes)
    assert any("its bias changed" in note and "conv_in" in note for note in report.notes)
    sdmerge.extract_lora(*files, tmp_path / "l.safetensors", rank=1, to="lycoris", family="sd1", dtype="fp32")
    sdmerge.bake(files[1], [tmp_path / "l.safetensors"], output=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.allclose(again[name], tuned[name], atol=1e-5) for name in (NORM, BIAS, toys.CONV_IN))


def test_text_encoders_can_be_left_alone(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, text_encoders=False, family="sd1")
    assert PATHS[FC1] not in extracted(tmp_path / "l.safetensors")


def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=5)
    files = [tmp_path / str(threads) / "l.safetensors" for threads in (1, 2, 5)]
    for file, threads in zip(files, (1, 2, 5), strict=True):
        file.parent.mkdir()
        sdmerge.extract_lora(tuned, base, file, rank=3, threads=threads, family="sd1")
    assert len({file.read_bytes() for file in files}) == 1


def test_open_clip_comes_apart_and_turns(tmp_path: Path) -> None:
    te2 = "conditioner.embedders.1.model."
    in_proj, projection = f"{te2}transformer.resblocks.0.attn.in_proj_weight", f"{te2}text_projection"
    base = {in_proj: torch.randn(18, 6), projection: torch.randn(6, 10)}
    change = {in_proj: torch.zeros(18, 6), projection: low_rank(torch.Size((6, 10)), 1, 3)}
    change[in_proj][6:12] = low_rank(torch.Size((6, 6)), 1, 4)
    tuned = {name: tensor + change[name] for name, tensor in base.items()}
    for name, tensors in (("t", tuned), ("b", base)):
        save_file(tensors, str(tmp_path / f"{name}.safetensors"))
    files = [tmp_path / f"{name}.safetensors" for name in "tb"]
    sdmerge.extract_lora(*files, tmp_path / "l.safetensors", rank=1, dtype="fp32", family="sdxl")
    found = extracted(tmp_path / "l.safetensors")
    k_proj = "te2.text_model.encoder.layers.0.self_attn.k_proj"
    assert set(found) == {k_proj, "te2.text_projection"}
    assert torch.allclose(found[k_proj].float(), change[in_proj][6:12], atol=1e-5)
    assert torch.allclose(found["te2.text_projection"].float(), change[projection].T, atol=1e-5)


def test_metadata_say_what_it_is(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, family="sd1")
    with open_source(tmp_path / "l.safetensors") as source:
        texts = source.metadata
    assert texts["ss_network_dim"] == texts["ss_network_alpha"] == "2"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(texts["sdmerge.extracted"]) == {"tuned": "tuned.safetensors", "base": "base.safetensors"}
    assert str(tmp_path) not in "".join(texts.values())


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    narrow = load_file(base) | {TO_Q: torch.randn(9, 8)}
    other = toys.save(tmp_path / "narrow.safetensors", narrow)
    with pytest.raises(MismatchError, match=r"is F32 \[8, 8\] in tuned.* and F32 \[9, 8\]"):
        sdmerge.extract_lora(tuned, other, tmp_path / "l.safetensors")
    with pytest.raises(RequestError, match="nothing changed"):
        sdmerge.extract_lora(base, base, tmp_path / "l.safetensors")
    save_file({"a.weight": torch.zeros(2, 2)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(FamilyError, match="two models of one family"):
        sdmerge.extract_lora(tuned, tmp_path / "x.safetensors", tmp_path / "l.safetensors")
    assert not (tmp_path / "l.safetensors").exists()


def test_the_picture_is_painted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tuned, base, _ = models(tmp_path)
    sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, plot=tmp_path / "r.png", family="sd1")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def wide_models(folder: Path) -> tuple[Path, Path, Tensor]:
    """Write two models whose first convolution is (24, 20, 3, 3), and its change, which Tucker's form of rank 6 nearly holds."""
    base = toys.toy(1, torch.float32) | {CONV: numbers(1, 24, 20, 3, 3, spread=0.1)}
    up, mid, down = numbers(2, 24, 6), numbers(3, 6, 6, 3, 3), numbers(4, 6, 20)
    change = torch.einsum("om,mnhw,ni->oihw", up, mid, down) + numbers(5, 24, 20, 3, 3, spread=0.02)
    tuned = base | {CONV: base[CONV] + change, TO_Q: base[TO_Q] + low_rank(base[TO_Q].shape, 2, 1)}
    return *(toys.save(folder / f"{n}.safetensors", t) for n, t in (("t", tuned), ("b", base))), change


def test_convolutions_may_have_a_core(tmp_path: Path) -> None:
    tuned, base, change = wide_models(tmp_path)
    flat, cored, report = (tmp_path / name for name in ("f.safetensors", "c.safetensors", "r.json"))
    sdmerge.extract_lora(tuned, base, flat, rank=6, family="sd1", to="lycoris")
    done = sdmerge.extract_lora(tuned, base, cored, rank=6, conv="tucker", family="sd1", report=report)[0]
    assert any("as lycoris" in note for note in done.notes)
    tensors = load_file(cored)
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{module}.lora_mid.weight"].shape == (6, 6, 3, 3)
    assert tensors[f"{module}.lora_down.weight"].shape == (6, 20, 1, 1)
    assert cored.stat().st_size < flat.stat().st_size
    error = (extracted(cored)[PATHS[CONV]] - change).norm() / change.norm()
    told = json.loads(report.read_text())["layers"]
    assert float(error) < 0.05
    assert told[PATHS[CONV]]["error"] == pytest.approx(float(error), abs=1e-3)
    assert told[PATHS[CONV]]["method"] == "tucker"
    assert told[PATHS[TO_Q]]["method"] == "eigen", "no convolution"


@pytest.mark.parametrize("bound", [{"size": 9_000}, {"size": 14_000}, {"energy": 0.9}, {"error": 0.02}])
def test_a_core_keeps_to_any_bound(bound: dict[str, float], tmp_path: Path) -> None:
    tuned, base, change = wide_models(tmp_path)
    out, also = tmp_path / "l.safetensors", tmp_path / "also.safetensors"
    sdmerge.extract_lora(tuned, base, out, **bound, conv="tucker", family="sd1", dtype="fp32", also={also: 8_000})
    error = float((extracted(out)[PATHS[CONV]] - change).norm() / change.norm())
    if "size" in bound:
        assert out.stat().st_size <= bound["size"]
        assert error < 0.9
    else:
        assert error <= bound.get("error", 0.1**0.5) * 1.001
    # A core of the rank that such a small error needs would be larger than two factors are.
    assert any("lora_mid" in name for name in load_file(out)) is ("error" not in bound)
    assert also.stat().st_size <= 8_000


def test_cores_need_a_layout_with_a_place_for_them(tmp_path: Path) -> None:
    tuned, base, _ = wide_models(tmp_path)
    with pytest.raises(CannotHold, match="kohya has no place for the cores.*lycoris"):
        sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=6, conv="tucker", to="kohya", family="sd1")


@pytest.mark.parametrize("size", [9_000, 12_000, 20_000])
def test_a_size_counts_norms_and_biases_and_is_filled(size: int, tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=8)
    bias = TO_Q.replace("weight", "bias")
    first, second = (load_file(path) for path in (base, tuned))
    first[bias], second[bias] = torch.zeros(8), torch.ones(8)
    second[NORM] = first[NORM] + 1
    for name in [name for name in first if name.startswith(toys.UNET) and first[name].dim() > 1]:
        second[name] = first[name] + low_rank(first[name].shape, 8, len(name))
    files = [toys.save(tmp_path / f"{n}.safetensors", t) for n, t in (("t", second), ("b", first))]
    out = tmp_path / "l.safetensors"
    sdmerge.extract_lora(*files, out, size=size, to="lycoris", family="sd1")
    assert size * 0.95 <= out.stat().st_size <= size
    with open_source(out) as source:
        modules = open_adapter(source)[0].modules
    assert modules[PATHS[TO_Q]].bias is not None


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("folder_first", [True, False])
def test_a_folder_and_a_single_file_are_compared_as_one_model(
    family: str, *, folder_first: bool, tmp_path: Path
) -> None:
    """OpenCLIP's projection is transposed in one, and the last layer's halves are the other way round."""
    base = families.tensors(family, torch.float32)
    torch.manual_seed(1)
    tuned = {name: t + torch.randn(t.shape) * 0.02 if t.dim() > 1 and t.shape[0] > 4 else t for name, t in base.items()}
    whole, part = (tuned, base) if folder_first else (base, tuned)
    files = [families.folder(tmp_path / "folder", whole), families.single(tmp_path / "one.safetensors", family, part)]
    out = tmp_path / "l.safetensors"
    notes = sdmerge.extract_lora(*(files if folder_first else files[::-1]), out, rank=99, dtype="fp32")[0].notes
    components = {"transformer": "unet", "text_encoder": "te1", "text_encoder_2": "te3" if family == "flux" else "te2"}
    components |= {"text_encoder_3": "te3", "unet": "unet"}
    changes = {}
    for name, tensor in tuned.items():
        component, _, key = name.removesuffix(".weight").partition(".")
        changes[f"{components[component]}.{key}"] = tensor.double() - base[name].double()
    found = extracted(out)
    assert len(found) > 60
    for path, change in found.items():
        expected = changes[path].flatten(1)
        assert (change.flatten(1) - expected).norm() <= 1e-4 * expected.norm(), path
    assert not any("shared" in path or "embeddings" in path or "attention_bias" in path for path in found)
    assert any(note.startswith("changed, and no part of a LoRA: ") for note in notes)


def test_a_gpu_that_is_not_here_is_told(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    with pytest.raises(RequestError, match="device cuda:99 is not here"):
        sdmerge.extract_lora(tuned, base, tmp_path / "lora.safetensors", rank=2, device="cuda:99")
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("bound", [{"rank": 2}, {"energy": 0.9}, {"rank": 2, "conv": "tucker"}])
def test_a_gpu_finds_the_same(bound: dict[str, Any], tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=3)
    told = []
    for device in ("cpu", "cuda"):
        report = tmp_path / f"{device}.json"
        sdmerge.extract_lora(tuned, base, tmp_path / f"{device}.safetensors", report=report, device=device, **bound)
        told.append(json.loads(report.read_text())["layers"])
    assert told[0].keys() == told[1].keys()
    for path, one in told[0].items():
        assert one["rank"] == told[1][path]["rank"]
        assert one["error"] == pytest.approx(told[1][path]["error"], abs=1e-3)
