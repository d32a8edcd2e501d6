"""Hypernetworks: the file, read back or folded into the model, is what was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import sdmerge
from benchmarks import concept
from sdformats.files import open_source
from sdformats.hypernetwork import read_hypernetwork
from sdmerge import contact_sheet
from sdmerge.errors import RequestError
from sdmerge.sampling import Painting
from sdmerge.train.beside import stands_beside
from sdmerge.train.hypernetwork_layers import activation, attach, in_memory
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from tests.formats.hypernetworks import ACTIVATIONS
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

CLOSE = 1e-5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("h.pt", {}),
        ("h.pt", {"to": "novelai"}),
        ("h.safetensors", {"activation": "swish", "layers": "1,1.5,2,1", "layer_norm": True, "dropout": 0.3}),
        ("h.pt", {"activation": "relu", "activate_output": True, "init": "KaimingNormal", "widths": "48"}),
    ],
    ids=str,
)
def test_the_file_read_back_is_what_was_trained(
    name: str, values: dict[str, Any], toy: Path, diamonds: Path, tmp_path: Path
) -> None:
    run = runs.trained("hypernetwork", toy, diamonds, tmp_path / name, steps=3, lr=1e-2, **values)
    networks = load(ModelSettings(model=str(toy)))
    before = runs.painted(networks)
    with open_source(tmp_path / name) as source:
        record = read_hypernetwork(source)
        pairs = in_memory(record)
    attach(networks.unet, pairs)
    assert (runs.painted(networks) - before).abs().max() > 1e-3
    assert (runs.painted(networks) - runs.painted(run.networks)).abs().max() < CLOSE
    if values.get("to") != "novelai":
        assert (record.settings.step, record.settings.name) == (3, "h")
        assert set(record.networks) == ({48} if "widths" in values else {32, 48, 64, 72})


def test_a_linear_one_folds_into_the_model(single: Path, diamonds: Path, tmp_path: Path) -> None:
    config = str(concept.TINY / "config")
    run = runs.trained("hypernetwork", single, diamonds, tmp_path / "h.pt", steps=3, lr=1e-2, model_config=config)
    sdmerge.bake(single, [tmp_path / "h.pt"], output=tmp_path / "b.safetensors", dtype="fp32")
    baked = load(ModelSettings(model=str(tmp_path / "b.safetensors"), model_config=config))
    assert (runs.painted(baked) - runs.painted(run.networks)).abs().max() < CLOSE


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_sample_uses_it_baked_or_beside(activation: str, single: Path, diamonds: Path, tmp_path: Path) -> None:
    config = str(concept.TINY / "config")
    run = runs.trained(
        "hypernetwork",
        single,
        diamonds,
        tmp_path / "h.pt",
        steps=3,
        lr=3e-2,
        model_config=config,
        activation=activation,
    )
    assert stands_beside(tmp_path / "h.pt") == (activation == "relu")
    request = contact_sheet.Request(
        model=ModelSettings(model=str(single), model_config=config),
        output=tmp_path / "o.png",
        prompts=("a",),
        seeds=(0,),
        painting=Painting(),
        adapters=((tmp_path / "h.pt", 1.0),),
        strengths=(0.0, 1.0),
    )
    painted = [runs.painted(networks) for _, networks in contact_sheet._variants(request)]
    plain = runs.painted(load(ModelSettings(model=str(single), model_config=config)))
    assert (painted[0] - plain).abs().max() < CLOSE
    assert (painted[1] - runs.painted(run.networks)).abs().max() < CLOSE


def test_torch_reads_it(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    run = runs.trained("hypernetwork", toy, diamonds, tmp_path / "h.pt", steps=2, lr=1e-2, activation="tanh")
    found = torch.load(tmp_path / "h.pt", weights_only=True)
    assert found["activate_output"] is False
    assert found["layer_structure"] == [1, 2, 1]
    weight = run.trained.parameters["48.1.2.weight"]
    assert torch.equal(found[48][1]["linear.2.weight"], weight.detach())


@pytest.mark.parametrize("name", [*ACTIVATIONS])
def test_activations_are_those_of_a1111(name: str) -> None:
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(activation(name)(x), ACTIVATIONS[name]()(x))
    with pytest.raises(RequestError, match="not known"):
        activation("module")


@pytest.mark.parametrize(
    ("values", "said"),
    [({"layers": "1,2"}, "begin and end"), ({"layers": "1,x,1"}, "numbers"), ({"widths": "47"}, "no attention layer")],
    ids=str,
)
def test_structures_that_make_no_sense_are_refused(
    values: dict[str, Any], said: str, toy: Path, diamonds: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        runs.trained("hypernetwork", toy, diamonds, tmp_path / "h.pt", steps=1, **values)
