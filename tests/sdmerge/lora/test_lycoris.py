"""LyCORIS makes of our files, of every algorithm, what we say; by the modules of a UNet that it finds itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdmerge import convert
from tests.sdmerge.lora.pipelines import assert_equal, kohya_name, our_changes, saved, unet, weights_of
from tests.sdmerge.lora.records import assert_close, by_lycoris, numbers, probed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("lycoris", reason="is an independent reader")
pytest.importorskip("diffusers", reason="builds the networks")


def _lora(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"lora_down.weight": (2, inner, *kernel), "lora_up.weight": (out, 2, *(1,) * len(kernel))}


def _tucker(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if kernel in ((), (1, 1)):
        return _lora(out, inner, kernel)
    return {"lora_down.weight": (3, inner, 1, 1), "lora_up.weight": (out, 3, 1, 1), "lora_mid.weight": (3, 3, *kernel)}


def _loha(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    columns = inner * (kernel[0] * kernel[1] if kernel else 1)
    return {f"hada_w{n}_{x}": (out, 3) if x == "a" else (3, columns) for n in "12" for x in "ab"}


def _loha_tucker(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if kernel in ((), (1, 1)):
        return _loha(out, inner, kernel)
    made: dict[str, tuple[int, ...]] = {f"hada_w{n}_{x}": (2, out if x == "a" else inner) for n in "12" for x in "ab"}
    return made | {f"hada_t{n}": (2, 2, *kernel) for n in "12"}


def _lokr(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    from lycoris.functional import factorization

    (o1, o2), (i1, i2) = factorization(out, -1), factorization(inner, -1)
    if max(o2, i2) / 2 > 1:
        return {
            "lokr_w1": (o1, i1),
            "lokr_w2_a": (o2, 1),
            "lokr_w2_b": (1, i2 * (kernel[0] * kernel[1] if kernel else 1)),
        }
    return {"lokr_w1": (o1, i1), "lokr_w2": (o2, i2, *kernel)}


def _full(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"diff": (out, inner, *kernel)}


def _rotation(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    from lycoris.functional import factorization

    size, count = factorization(out, 4)
    return {"oft_blocks": (count, size, size)}


def _glora(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if kernel:
        return _lora(out, inner, kernel)
    return {"a1.weight": (inner, 2), "a2.weight": (2, inner), "b1.weight": (out, 2), "b2.weight": (2, inner)}


def _dora(out: int, inner: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return _lora(out, inner, kernel) | {"dora_scale": (out, 1, *(1,) * len(kernel))}


KINDS = (_lora, _tucker, _loha, _loha_tucker, _lokr, _full, _rotation, _glora, _dora)


def every_algorithm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter under sd-scripts' names, with an algorithm for each module in turn."""
    tensors: dict[str, Tensor] = {}
    for number, (path, weight) in enumerate(weights.items()):
        out, inner, *kernel = weight.shape
        name = kohya_name(path, "sd1")
        shapes = KINDS[number % len(KINDS)](out, inner, tuple(kernel))
        for seed, (role, shape) in enumerate(shapes.items()):
            made = numbers(10 * number + seed, *shape, spread=0.3)
            tensors[f"{name}.{role}"] = made.abs() + 0.5 if role == "dora_scale" else made
        if "diff" not in shapes:
            tensors[f"{name}.alpha"] = torch.tensor(0.0 if "oft_blocks" in shapes else float(1 + number % 4))
    return tensors


@pytest.mark.parametrize("scaled", [True, False], ids=["alpha", "no alpha"])
def test_lycoris_reads_every_algorithm_in_its_layout(tmp_path: Path, scaled: bool) -> None:
    before = weights_of(unet("sd1"), "unet")
    tensors = {name: value for name, value in every_algorithm(before).items() if scaled or not name.endswith(".alpha")}
    file = saved(tmp_path / "in.safetensors", tensors, "sd1")
    convert(file, tmp_path / "comfy.safetensors", to="comfy", family="sd1")
    convert(tmp_path / "comfy.safetensors", tmp_path / "out.safetensors", to="lycoris", family="sd1")
    changes = our_changes(file, before)
    assert changes.keys() == before.keys(), "every module is in the file"
    assert_equal(our_changes(tmp_path / "out.safetensors", before), changes)
    written = load_file(str(tmp_path / "out.safetensors"))
    for path, weight in before.items():
        name = kohya_name(path, "sd1")
        own = {key.removeprefix(f"{name}."): value for key, value in written.items() if key.startswith(f"{name}.")}
        assert_close(changes[path], by_lycoris(own, weight), 2e-5)


def test_lycoris_finds_the_modules_of_its_wrapper(tmp_path: Path) -> None:
    from lycoris.wrapper import create_lycoris_from_weights

    network = unet("sd1")
    modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for module in modules.values():
        module.stride = (1, 1)  # so that outputs show all of the weight
    before = weights_of(network, "unet")
    probes = {name: probed(module) for name, module in modules.items()}
    file = saved(tmp_path / "in.safetensors", every_algorithm(before), "sd1")
    convert(file, tmp_path / "out.safetensors", to="lycoris-wrapper", family="sd1")
    found, _ = create_lycoris_from_weights(1.0, None, network, load_file(str(tmp_path / "out.safetensors")))
    assert len(found.loras) == len(before)
    for adapter in found.loras:
        adapter.apply_to()
    changes = our_changes(file, before)
    for name, module in modules.items():
        assert_close(probed(module) - probes[name], changes[f"unet.{name}"], 2e-5)
