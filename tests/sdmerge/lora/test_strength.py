"""A strength s scales a change by s, alpha and rank included: every algorithm, against LyCORIS's modules and PEFT's merging."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdmerge
from tests.sdmerge import toys
from tests.sdmerge.lora.lycoris_cases import CASES, made
from tests.sdmerge.lora.pipelines import unet, weights_of
from tests.sdmerge.lora.records import assert_close

if TYPE_CHECKING:
    from pathlib import Path

STRENGTH = -0.7
BLOCK = "unet_down_blocks_0_"
PLACES = {
    2: (
        f"{BLOCK}attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
    ),
    4: (f"{BLOCK}resnets_0_conv1", "input_blocks.1.0.in_layers.2.weight"),
}
"""The adapter's module and the model's weight, by how many axes that has."""
NOT_LINEAR = ("dora", "dora-conv", "dora-loha", "boft", "oft-rescale")
"""LyCORIS puts its multiplier inside of a norm or of a product of turns; ours scales the whole change."""


@torch.no_grad()
def of_lycoris(name: str, inputs: Tensor, multiplier: float) -> Tensor:
    """Return the outputs of a layer inside LyCORIS's module."""
    modules: Any = pytest.importorskip("lycoris.modules")
    kind, layer, tensors = made(name)
    cls = getattr(modules, kind)
    wrapper = cls.make_module_from_state_dict("layer", layer, *(tensors.get(end) for end in cls.weight_list))
    wrapper.apply_to()
    wrapper.eval()
    wrapper.multiplier = multiplier
    found: Tensor = layer(inputs)
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_multiplier_of_lycoris(name: str, tmp_path: Path) -> None:
    _, layer, tensors = made(name)
    weight = layer.get_parameter("weight").detach()
    module, place = PLACES[weight.dim()]
    base = toys.save(tmp_path / "a.safetensors", toys.toy(1, torch.float32) | {toys.UNET + place: weight})
    save_file({f"lora_{module}.{end}": tensor for end, tensor in tensors.items()}, str(tmp_path / "l.safetensors"))
    sdmerge.bake(base, [(tmp_path / "l.safetensors", STRENGTH)], output=tmp_path / "out.safetensors", family="sd1")
    baked = load_file(tmp_path / "out.safetensors")[toys.UNET + place]
    operation = partial(nn.functional.conv2d, padding=1) if weight.dim() == 4 else nn.functional.linear
    inputs = torch.randn(5, *((36, 6, 6) if weight.dim() == 4 else (36,)))
    plain = operation(inputs, weight)
    if name in NOT_LINEAR:
        expected = plain + STRENGTH * (of_lycoris(name, inputs, 1.0) - plain)
    else:
        expected = of_lycoris(name, inputs, STRENGTH)
    assert_close(operation(inputs, baked) - plain, expected - plain, 2e-5)


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "dora", "loha", "lokr", "lokr, whole", "oft"])
def test_it_is_the_scale_of_peft(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    from tests.sdmerge.lora.test_peft import CONFIGS, trained

    before, after = trained(CONFIGS[name](), tmp_path / "saved")
    save_file(
        {f"{path.removeprefix('unet.')}.weight": tensor for path, tensor in before.items()},
        str(tmp_path / "a.safetensors"),
    )
    adapter = tmp_path / "saved" / "adapter_model.safetensors"
    sdmerge.bake(tmp_path / "a.safetensors", [(adapter, STRENGTH)], output=tmp_path / "out.safetensors", family="sd1")
    baked = load_file(tmp_path / "out.safetensors")
    if name in ("dora", "oft"):  # PEFT scales inside of DoRA's norm, and rotations not at all
        expected = {path: before[path] + STRENGTH * (after[path] - before[path]) for path in before}
    else:
        model = peft.PeftModel.from_pretrained(unet("sd1"), str(tmp_path / "saved"))
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.scale_layer(STRENGTH)
        expected = weights_of(model.merge_and_unload(), "unet")
    changed = [path for path, weight in before.items() if not torch.equal(expected[path], weight)]
    assert len(changed) > 10
    for path, weight in before.items():
        found = baked[f"{path.removeprefix('unet.')}.weight"]
        if path in changed:
            assert_close(found - weight, expected[path] - weight, 2e-5)
        else:
            assert torch.equal(found, weight)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_merged_adapters_and_baked_ones_mean_the_same(kind: str, tmp_path: Path) -> None:
    """Merged at strengths, then baked at another, is baked at the products."""
    from sdmerge.adapters import merge_lora
    from tests.sdmerge.lora import samples

    modules = (samples.CONV,) if kind == "lora" else (samples.Q,)
    weight = torch.randn(samples.SIZES[modules[0]][0], samples.SIZES[modules[0]][1], *samples.SIZES[modules[0]][2])
    place = toys.UNET + PLACES[weight.dim()][1]
    base = toys.save(tmp_path / "a.safetensors", toys.toy(1, torch.float32) | {place: weight})
    make: Any = getattr(samples, kind)
    files = [samples.saved(tmp_path / f"{seed}.safetensors", make(modules, seed=seed)) for seed in (1, 2)]
    merge_lora([(files[0], 0.5), (files[1], -2.0)], tmp_path / "m.safetensors")
    sdmerge.bake(base, [(tmp_path / "m.safetensors", 0.25)], output=tmp_path / "x.safetensors", family="sd1")
    sdmerge.bake(base, [(files[0], 0.125), (files[1], -0.5)], output=tmp_path / "y.safetensors", family="sd1")
    changes = [load_file(tmp_path / f"{name}.safetensors")[place] - weight for name in "xy"]
    assert changes[1].norm() > 0.1
    assert_close(changes[0], changes[1], 1e-5)
