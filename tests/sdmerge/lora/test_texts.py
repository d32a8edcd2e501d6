"""Metadata of adapters: what sd-scripts, A1111 and readers of the model specification look for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save

import sdmerge
from sdformats.files import open_source
from sdmerge.adapters import merge_lora, resize_lora
from sdmerge.hashing import hashes
from tests.sdmerge.lora import samples
from tests.sdmerge.lora.test_extract import models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MIB = 1 << 20


def texts_of(path: Path) -> Mapping[str, str]:
    with open_source(path) as source:
        return source.metadata


def written(kind: str, folder: Path) -> Path:
    """Write an adapter by each of the commands that make new bytes."""
    out = folder / "out.safetensors"
    if kind == "extract":
        tuned, base, _ = models(folder)
        sdmerge.extract_lora(tuned, base, out, rank=2, family="sd1")
        return out
    texts = {"ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_base_model_version": "sd_v1"}
    source = samples.saved(folder / "in.safetensors", samples.lora(dtype=torch.float16), **texts, sshs_model_hash="old")
    if kind == "resize":
        resize_lora(source, out, rank=2)
    elif kind == "merge":
        merge_lora([source, (source, 0.5)], out)
    else:
        sdmerge.convert(source, out, to="kohya")
    return out


@pytest.mark.parametrize("kind", ["extract", "resize", "merge", "convert"])
def test_sd_scripts_hashes_are_those_of_the_bytes(kind: str, tmp_path: Path) -> None:
    path = written(kind, tmp_path)
    texts, raw = texts_of(path), path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert texts["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert texts["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8], "the file ends before 1 MiB"
    with open_source(path) as source:
        assert hashes(source).autov3 == texts["sshs_model_hash"][:12]


@pytest.mark.parametrize("count", [40, 9000], ids=["short header", "header beyond 1 MiB"])
def test_the_legacy_hash_is_of_a_file_with_texts_of_training_alone(count: int, tmp_path: Path) -> None:
    """What sd-scripts computes from the tensors: a file without other texts, as the reference library writes it."""
    wide = 20_000 if count == 40 else 2
    names = [f"lora_unet_{'x' * 60}_{i:05}.lora_{side}.weight" for i in range(count // 2) for side in ("down", "up")]
    tensors = {name: torch.full((1, wide), i % 200, dtype=torch.float16) for i, name in enumerate(sorted(names))}
    texts = {"ss_network_module": "networks.lora", "other": "text" * 5000}
    from sdformats.safetensors import SafetensorsSink
    from sdformats.tensor import DType, Spec
    from sdmerge import hashing

    specs = {name: Spec(tuple(tensor.shape), DType.F16) for name, tensor in tensors.items()}
    path = tmp_path / "a.safetensors"
    with SafetensorsSink(path, specs, texts | hashing.SD_SCRIPTS, seal=hashing.sd_scripts) as sink:
        for name, tensor in tensors.items():
            sink.write(name, 0, memoryview(tensor.view(torch.uint8).numpy().reshape(-1)))
    reference = save(tensors, {"ss_network_module": "networks.lora"})
    assert len(reference) > MIB + (1 << 16)
    assert texts_of(path)["sshs_legacy_hash"] == hashlib.sha256(reference[MIB : MIB + (1 << 16)]).hexdigest()[:8]
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert texts_of(path)["other"] == texts["other"]


def test_an_extraction_says_what_sd_scripts_says(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path, rank=5)
    out = tmp_path / "star.safetensors"
    sdmerge.extract_lora(tuned, base, out, rank=4, conv_rank=2, family="sd1")
    texts = texts_of(out)
    assert texts["ss_network_module"] == "networks.lora"
    assert (texts["ss_network_dim"], texts["ss_network_alpha"]) == ("4", "4")
    assert json.loads(texts["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert (texts["ss_base_model_version"], texts["ss_v2"]) == ("sd_v1", "False")
    assert {key: text for key, text in texts.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "star",
        "modelspec.resolution": "512x512",
    }
    assert not any("date" in key or str(tmp_path) in text for key, text in texts.items())


def test_what_the_model_predicts_is_passed_on(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tuned, base, _ = models(tmp_path)
    save_file(load_file(tuned), tuned, {"modelspec.prediction_type": "epsilon"})
    sdmerge.extract_lora(tuned, base, tmp_path / "a.safetensors", rank=1, family="sd1")
    assert texts_of(tmp_path / "a.safetensors")["modelspec.prediction_type"] == "epsilon"
    save_file(load_file(tuned) | {"v_pred": torch.zeros(0)}, tuned)
    sdmerge.extract_lora(tuned, base, tmp_path / "b.safetensors", rank=1, family="sd1")
    assert texts_of(tmp_path / "b.safetensors")["modelspec.prediction_type"] == "v"


def test_layouts_without_sd_scripts_texts_have_no_hashes(tmp_path: Path) -> None:
    source = samples.saved(tmp_path / "in.safetensors", samples.lora())
    sdmerge.convert(source, tmp_path / "out.safetensors", to="diffusers")
    assert not any(key.startswith("sshs_") for key in texts_of(tmp_path / "out.safetensors"))


def test_a_fault_while_sealing_leaves_nothing(tmp_path: Path) -> None:
    from sdformats.safetensors import SafetensorsSink
    from sdformats.tensor import DType, Spec

    def fails(_: SafetensorsSink) -> Mapping[str, str]:
        raise ArithmeticError

    with (
        pytest.raises(ArithmeticError),
        SafetensorsSink(tmp_path / "a.safetensors", {"a": Spec((2,), DType.F32)}, {}, seal=fails) as sink,
    ):
        sink.write("a", 0, memoryview(bytes(8)))
    assert list(tmp_path.iterdir()) == []
