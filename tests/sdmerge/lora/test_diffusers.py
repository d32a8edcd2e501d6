"""diffusers makes of our files what we say, and we make of its files what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdmerge import convert
from tests.sdmerge.lora.pipelines import (
    all_weights,
    assert_equal,
    assert_same_changes,
    lora_file,
    our_changes,
    pipeline,
)
from tests.sdmerge.lora.records import numbers

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("diffusers", reason="is an independent reader")
pytest.importorskip("peft", reason="diffusers reads LoRA with it")


def fused(pipe: Any, file: Path) -> dict[str, Tensor]:
    """Return the weights after diffusers has loaded a file and fused it."""
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    names = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None]
    pipe.fuse_lora(components=names)
    return all_weights(pipe)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_reads_mixed_ranks_and_alphas(tmp_path: Path, family: str, dora: bool) -> None:
    pipe = pipeline(family)
    before = all_weights(pipe)
    file = lora_file(tmp_path / "in.safetensors", before, family, dora=dora)
    target = tmp_path / "out.safetensors"
    convert(file, target, to="diffusers")
    changes = our_changes(file, before)
    assert changes.keys() == before.keys(), "every module is in the file"
    assert_equal(our_changes(target, before), changes)
    assert_same_changes(fused(pipe, target), before, changes)


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sdxl", "kohya"), ("sdxl", "kohya-sgm")])
def test_diffusers_reads_sd_scripts_names(tmp_path: Path, family: str, layout: str) -> None:
    pipe = pipeline(family)
    before = all_weights(pipe)
    # diffusers takes the underscore of lora_unet_add_embedding for a dot, and leaves it out; as label_emb it finds it.
    named = {path: weight for path, weight in before.items() if layout != "kohya" or "add_embedding" not in path}
    file = lora_file(tmp_path / "in.safetensors", named, family, uniform=True)
    convert(file, tmp_path / "diffusers.safetensors", to="diffusers")
    target = tmp_path / "out.safetensors"
    convert(tmp_path / "diffusers.safetensors", target, to=layout)
    assert_same_changes(fused(pipe, target), before, our_changes(file, before))


def trained(family: str, folder: Path, *, told: bool) -> Path:
    """Save a file by diffusers, of factors that change something; `told`: with its settings beside them."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    pipe, layers = pipeline(family), {}
    networks: dict[str, Any] = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    networks = {name: network for name, network in networks.items() if network is not None}
    for number, (name, network) in enumerate(networks.items()):
        q, k, other = ("to_q", "to_k", "conv1") if name == "unet" else ("q_proj", "k_proj", "fc1")
        config = {"r": 2, "lora_alpha": 3, "rank_pattern": {q: 3}, "alpha_pattern": {k: 1}} if told else {"r": 2}
        network.add_adapter(LoraConfig(target_modules=[q, k, other], **({"lora_alpha": 2} | config)))
        for seed, parameter in enumerate(p for key, p in network.named_parameters() if ".lora_" in key):
            parameter.data.copy_(numbers(seed + 1000 * number, *parameter.shape))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="default")
    settings = _collate_lora_metadata(networks) if told else {}
    pipe.save_lora_weights(str(folder), **layers, **settings)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("told", [True, False], ids=["settings", "no settings"])
def test_what_diffusers_saves_is_read_as_it_fuses_it(tmp_path: Path, family: str, told: bool) -> None:
    file = trained(family, tmp_path / "saved", told=told)
    pipe = pipeline(family)
    before = all_weights(pipe)
    changes = our_changes(file, before)
    assert any(path.startswith("te1.text_model.encoder.") for path in changes)
    assert_same_changes(fused(pipe, file), before, changes)
    target = tmp_path / "out.safetensors"
    convert(file, target, to="kohya" if family == "sd1" else "kohya-sgm")
    assert_equal(our_changes(target, before), changes)
    names = [name for name in load_file(str(target)) if name.startswith("lora_te")]
    assert names
    assert all("_text_model_encoder_" in name for name in names)


@pytest.mark.parametrize(("layout", "short"), [("diffusers", "text_encoder."), ("kohya", "lora_te_")])
def test_names_without_text_model_are_read_and_never_written(tmp_path: Path, layout: str, short: str) -> None:
    before = all_weights(pipeline("sd1"))
    file = lora_file(tmp_path / "in.safetensors", before, "sd1")
    plain, dialect, target = (tmp_path / f"{name}.safetensors" for name in ("plain", "dialect", "out"))
    convert(file, plain, to=layout)
    tensors = load_file(str(plain))
    bare = {name.replace("text_model.", "").replace("text_model_", ""): tensor for name, tensor in tensors.items()}
    assert any(name.startswith(f"{short}encoder") for name in bare)
    with safe_open(str(plain), "pt") as opened:
        save_file(bare, str(dialect), metadata=opened.metadata())
    assert_equal(our_changes(dialect, before), our_changes(file, before))
    convert(dialect, target, to=layout)
    assert load_file(str(target)).keys() == tensors.keys()
