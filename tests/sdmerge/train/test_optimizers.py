"""Optimizers, the course of the learning rate, groups of parameters, and the average of the weights."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import Parameter

from sdmerge.errors import RequestError
from sdmerge.train.method import Trained
from sdmerge.train.optimizers import Average, optimizer_for, rate_at, set_rate
from sdmerge.train.settings import OptimizerSettings
from tests.sdmerge.train import runs
from tests.sdmerge.train.test_loop import losses, same

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
RATES = {"adamw8bit": 3e-3, "prodigy": 1.0}


def test_rates_over_the_steps() -> None:
    constant = OptimizerSettings(warmup=4)
    assert [rate_at(step, 10, constant) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    falling = OptimizerSettings(schedule="linear")
    assert [rate_at(step, 4, falling) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = OptimizerSettings(schedule="cosine", warmup=2)
    assert rate_at(2, 12, cosine) == 1.0
    assert rate_at(7, 12, cosine) == pytest.approx(0.5)
    assert rate_at(11, 12, cosine) < 0.03


def test_parameters_with_rates_of_their_own() -> None:
    parameters = {name: Parameter(torch.ones(2)) for name in "abc"}
    optimizer = optimizer_for(Trained(parameters, {"b": 0.5}), OptimizerSettings(lr=0.1, weight_decay=0.0))
    set_rate(optimizer, 0.2)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 0.2), (1, 0.1)]
    for one in parameters.values():
        one.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(parameters["a"].detach(), torch.full((2,), 0.8))
    torch.testing.assert_close(parameters["b"].detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize(("name", "package"), [*PACKAGES.items()])
def test_optimizers_that_are_not_here_are_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=f"needs {package}.*pip install"):
        optimizer_for(Trained({"a": Parameter(torch.ones(1))}), OptimizerSettings(optimizer=name))


@pytest.mark.parametrize(("name", "package"), [*PACKAGES.items()])
def test_other_optimizers_train_and_go_on_where_they_stopped(
    name: str, package: str, toy: Path, diamonds: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    values: dict[str, Any] = {"rank": 16, "targets": "attention", "lr": RATES[name], "batch": 8, "optimizer": name}
    straight, halting = tmp_path / "straight.safetensors", tmp_path / "halting.safetensors"
    run = runs.trained("lora", toy, diamonds, straight, steps=20, **values)
    said = losses(run.folder)
    assert statistics.mean(said[-6:]) < 0.8 * statistics.mean(said[:6])
    assert "torch" not in type(run.optimizer.optimizer).__module__
    runs.trained("lora", toy, diamonds, halting, steps=8, save_every=8, **values)
    halting.unlink()
    again = runs.trained("lora", toy, diamonds, halting, steps=20, resume=True, **values)
    assert "going on after step 8" in again.tell.notes  # type: ignore[attr-defined]
    assert same(straight, halting)


def test_prodigy_is_told_of_one_rate_only() -> None:
    parameters = {name: Parameter(torch.ones(2)) for name in "ab"}
    with pytest.raises(RequestError, match="--text-lr"):
        optimizer_for(Trained(parameters, {"b": 0.5}), OptimizerSettings(optimizer="prodigy", lr=1.0))


def test_the_average_follows_the_weights_and_can_stand_in_for_them() -> None:
    weight = Parameter(torch.zeros(3))
    average = Average({"w": weight}, 0.9)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 60):
        with torch.no_grad():
            weight += 1
        average.update(step)
        share = 1 - min(0.9, (1 + step) / (10 + step))
        expected += share * (weight.detach().double() - expected)
    torch.testing.assert_close(average.values["w"].double(), expected, atol=1e-4, rtol=1e-5)
    with average.applied():
        assert torch.equal(weight.detach(), average.values["w"])
    assert weight.detach().tolist() == [59.0] * 3
