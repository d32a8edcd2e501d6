"""A LoRA baked into a model of any family, in any spelling, comes back by extraction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdformats.adapters import open_adapter
from sdformats.files import open_source
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from tests.sdmerge.lora import families

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

for _name in ("diffusers", "transformers"):
    pytest.importorskip(_name, reason="builds the models")

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
CASES = [(family, torch.float16) for family in families.FAMILIES] + [("sd1", torch.bfloat16), ("flux", torch.bfloat16)]


def noise(weight: Tensor, dtype: torch.dtype) -> float:
    """Return the expected norm of rounding a weight to a type: a step over √12 for each element."""
    steps = 2.0 ** weight.abs().clamp(min=2.0**-14).log2().floor() * EPS[dtype]
    return float(steps.norm()) / 12**0.5


@pytest.mark.parametrize("spelling", ["folder", "single"])
@pytest.mark.parametrize(("family", "dtype"), CASES, ids=lambda one: str(one).removeprefix("torch."))
def test_a_lora_comes_back(family: str, dtype: torch.dtype, spelling: str, tmp_path: Path) -> None:
    """Within twice the rounding noise of the model's type, layer by layer, text encoders included."""
    given = families.tensors(family, dtype)
    end = "" if spelling == "folder" else ".safetensors"
    base, tuned, back = tmp_path / f"base{end}", tmp_path / f"tuned{end}", tmp_path / "back.safetensors"
    if spelling == "folder":
        families.folder(base, given)
    else:
        families.single(base, family, given)
    adapter, changes = families.lora(tmp_path / "l", family)
    sdmerge.bake(base, [adapter], output=tuned, family=family)
    sdmerge.extract_lora(tuned, base, back, rank=families.RANK, family=family)
    weights = {path: module.weight.detach().double().flatten(1) for path, module in families.modules(family)}
    with open_source(back) as source:
        modules = open_adapter(source)[0].modules
        assert modules.keys() == changes.keys(), "every module of every network, and nothing else"
        for path, record in modules.items():
            found = delta(record, lambda ref: value(ref).double()).flatten(1)
            assert (found - changes[path]).norm() <= 2 * noise(weights[path] + changes[path], dtype), path


@pytest.mark.parametrize("family", families.FAMILIES)
def test_single_files_and_folders_get_the_same_weights(family: str, tmp_path: Path) -> None:
    given = families.tensors(family, torch.float16)
    adapter, _ = families.lora(tmp_path / "l", family)
    sdmerge.bake(families.folder(tmp_path / "a", given), [adapter], output=tmp_path / "b", family=family)
    baked = families.read_folder(tmp_path / "b")
    single = families.single(tmp_path / "one.safetensors", family, given)
    sdmerge.bake(single, [adapter], output=tmp_path / "two.safetensors", family=family)
    expected = load_file(families.single(tmp_path / "three.safetensors", family, baked))
    found = load_file(tmp_path / "two.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
