"""LoRA and its relatives: what is trained is what the file says, to every program that reads it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from torch.nn import Conv2d, Linear

from sdformats.adapters import open_adapter
from sdformats.files import open_source
from sdmerge.errors import RequestError
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from sdmerge.train.inject import inject, restore, trainable
from sdmerge.train.loading import load
from sdmerge.train.records import ALGORITHMS, Plan, untrained
from sdmerge.train.settings import ModelSettings
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

CLOSE = 1e-5


def layer(kind: str) -> Linear | Conv2d:
    torch.manual_seed(3)
    return Linear(12, 18) if kind == "linear" else Conv2d(6, 8, int(kind), padding=int(kind) // 2, stride=2)


@pytest.mark.parametrize("kind", ["linear", "1", "3"])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS])
def test_a_new_record_changes_nothing_and_learns(algorithm: str, kind: str) -> None:
    module = layer(kind)
    module.requires_grad_(False)
    x = torch.randn(2, 12) if kind == "linear" else torch.randn(2, 6, 7, 7)
    before = module(x)
    record, fields = trainable(untrained(algorithm, Plan(module.weight, 4, 2.0)))
    inject(module, record)
    torch.testing.assert_close(module(x), before, atol=1e-6, rtol=1e-5)
    optimizer = torch.optim.SGD(fields.values(), lr=0.05)
    for _ in range(2):  # the second step reaches the factors that began beside zeros
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in fields.values())
    after = module(x)
    restore(module)
    torch.testing.assert_close(module(x), before)
    with torch.no_grad():
        module.weight += delta(record, lambda ref: ref.values, module.weight)  # type: ignore[attr-defined]
    torch.testing.assert_close(module(x), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"algo": "lora", "text_encoder": True},
        {"algo": "lora", "targets": "all", "alpha": 2.0},
        {"algo": "dora"},
        {"algo": "loha", "targets": "attention"},
        {"algo": "lokr", "targets": "all"},
        {"algo": "oft", "modules": r"unet\..*\.attn2\.to_[kv]"},
    ],
    ids=str,
)
def test_the_file_read_back_is_what_was_trained(
    values: dict[str, Any], toy: Path, diamonds: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    run = runs.trained("lora", toy, diamonds, output, steps=3, rank=4, lr=1e-2, **values)
    networks = load(ModelSettings(model=str(toy)))
    before = runs.painted(networks)
    _apply(networks, output)
    assert (runs.painted(networks) - before).abs().max() > 1e-3
    assert (runs.painted(networks) - runs.painted(run.networks)).abs().max() < CLOSE


def _apply(networks: Any, path: Path) -> None:
    """Add an adapter's changes to the networks' weights."""
    with open_source(path) as source, torch.no_grad():
        adapter, _ = open_adapter(source)
        for name, record in adapter.modules.items():
            component, _, inner = name.partition(".")
            module = networks.modules[component].get_submodule(inner.removeprefix("text_model."))
            module.weight += delta(record, value, module.weight)


@pytest.mark.parametrize(
    "values",
    [
        {"text_encoder": True},
        {"to": "diffusers", "text_encoder": True, "alpha": 2.0},
        {"to": "diffusers", "algo": "dora", "targets": "attention"},
    ],
    ids=str,
)
def test_diffusers_reads_it(values: dict[str, Any], toy: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run = runs.trained("lora", toy, diamonds, output, steps=3, rank=4, lr=1e-2, **values)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(toy, safety_checker=None)
    pipe.load_lora_weights(str(tmp_path), weight_name=output.name)
    networks = load(ModelSettings(model=str(toy)))
    networks.unet, networks.texts[0].model = pipe.unet, pipe.text_encoder
    assert (runs.painted(networks) - runs.painted(run.networks)).abs().max() < CLOSE


def test_peft_reads_it(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    import peft

    output = tmp_path / "out"
    run = runs.trained("lora", toy, diamonds, output, steps=3, rank=4, lr=1e-2, alpha=2.0, to="peft")
    networks = load(ModelSettings(model=str(toy)))
    networks.unet = peft.PeftModel.from_pretrained(networks.unet, str(output))
    assert (runs.painted(networks) - runs.painted(run.networks)).abs().max() < CLOSE


def test_what_cannot_be_trained_or_written_is_told_before_the_first_step(
    toy: Path, diamonds: Path, tmp_path: Path
) -> None:
    for values, said in (
        ({"modules": "("}, "no pattern"),
        ({"modules": "nothing"}, "nothing to train"),
        ({"to": "kohya", "algo": "loha"}, "cannot hold"),
        ({"to": "nowhere"}, "no layout"),
    ):
        with pytest.raises(Exception, match=said):
            runs.trained("lora", toy, diamonds, tmp_path / "o.safetensors", steps=1, **values)
    with pytest.raises(RequestError, match=r"ends in \.safetensors"):
        runs.trained("lora", toy, diamonds, tmp_path / "o.ckpt", steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
