"""Baking by the kernels over tables, on a pretended GPU: what `test_bake` says of the CPU holds there."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdmerge.lora import grouped
from tests.sdmerge import toys
from tests.sdmerge.lora import test_bake as baking
from tests.sdmerge.lora.lycoris_cases import CASES
from tests.sdmerge.pretended import Pretended, pretend

if TYPE_CHECKING:
    from pathlib import Path

    from sdkernels.kernel import Kernel
    from sdkernels.table import Layer


OWN = {
    "lora": "lowrank", "locon": "lowrank", "tucker": "lowrank", "loha": "hadamard", "loha-conv": "hadamard",
    "lokr": "kron", "lokr-first-whole": "kron", "lokr-whole": "kron", "lokr-conv": "kron", "lokr-conv-whole": "kron",
    "dora": "dora", "dora-conv": "dora",
}  # fmt: skip
"""Whose kernel takes which algorithm; the others are made whole."""


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch, always=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the layers that every kernel was given, and the launches."""
    found: Counter[str] = Counter()

    def counted(kernel: Kernel[tuple[torch.Tensor, ...]]) -> object:
        def call(layers: list[Layer]) -> object:
            found[kernel.name] += len(layers)
            found["launches"] += 1
            return kernel(layers)

        return call

    monkeypatch.setattr(grouped, "_KERNELS", tuple(map(counted, grouped._KERNELS)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_is_added_with_one_rounding(name: str, tmp_path: Path, launched: Counter[str]) -> None:
    baking.test_every_algorithm_is_added_with_one_rounding(name, tmp_path)
    kernel = OWN.get(name)
    assert launched == ({} if kernel is None else {f"{kernel}.bake": 1, "launches": 1})


def test_several_adapters_are_one_launch(
    tmp_path: Path, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdmerge.gpu.BATCH", 1 << 20)
    baking.test_several_adapters_are_rounded_once(tmp_path)
    assert launched == {"lowrank.bake": 2, "launches": 1}


def test_rows_and_transposed_tensors(tmp_path: Path) -> None:
    baking.test_open_clip_has_q_k_and_v_in_one_and_its_projection_transposed(tmp_path)


def test_fused_modules(tmp_path: Path) -> None:
    baking.test_flux_has_fused_modules_and_swapped_halves(tmp_path)


def test_biases_norms_and_whole_differences(tmp_path: Path) -> None:
    baking.test_biases_norms_and_whole_differences(tmp_path)


def test_by_chance(tmp_path: Path) -> None:
    baking.test_stochastic_rounding_keeps_weak_adapters(tmp_path)


def test_mixed_algorithms_pass_through_float32(tmp_path: Path, launched: Counter[str]) -> None:
    base = toys.saved(tmp_path, "a", 1, torch.bfloat16)
    one = baking.save(tmp_path / "l.safetensors", baking.lora(baking.TO_Q, 8, 8, alpha=0.01))
    w1, w2 = torch.full((2, 2), 0.01), torch.eye(4)
    two = baking.save(tmp_path / "k.safetensors", {f"{baking.TO_Q}.lokr_w1": w1, f"{baking.TO_Q}.lokr_w2": w2})
    out = tmp_path / "out.safetensors"
    sdmerge.bake(base, [one, two], output=out)
    before = toys.toy(1, torch.bfloat16)[baking.MODEL_TO_Q].double()
    exact = before + 0.005 * baking.product(load_file(one), baking.TO_Q) + torch.kron(w1, w2).double()
    assert torch.equal(load_file(out)[baking.MODEL_TO_Q], exact.float().bfloat16())
    assert launched == {"lowrank.bake": 1, "kron.bake": 1, "launches": 2}


def test_factors_are_multiplied_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits are what tensor cores take; what takes arithmetic first is in float32."""
    seen: list[set[torch.dtype]] = []
    bake = grouped._KERNELS[0]
    monkeypatch.setattr(
        grouped, "_KERNELS",
        (lambda layers: (seen.append({x.dtype for one in layers for part in one.parts for x in part[:2]}), bake(layers)),),
    )  # fmt: skip
    tensors = {name: x.half() for name, x in baking.lora(baking.TO_Q, 8, 8, alpha=1.0).items()}
    adapter = baking.save(tmp_path / "l.safetensors", tensors)
    sdmerge.bake(toys.saved(tmp_path, "a", 1), [adapter], output=tmp_path / "out.safetensors")
    assert seen == [{torch.float16}]
