"""Hypernetworks as torch modules, built from A1111's settings, and files of them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softsign": nn.Softsign,
}
FULL: Mapping[str, Any] = {
    "step": 1200,
    "name": "style",
    "layer_structure": [1, 2, 1, 1],
    "activation_func": "swish",
    "is_layer_norm": True,
    "weight_initialization": "XavierUniform",
    "sd_checkpoint": "0123abcd",
    "sd_checkpoint_name": "model.ckpt",
    "activate_output": False,
    "use_dropout": True,
    "dropout_structure": [0, 0.1, 0.2, 0],
    "last_layer_dropout": True,
    "optional_info": "notes, with „quotes“",
}
"""All that A1111 writes, nothing of it at its default."""


def networks(settings: Mapping[str, Any], width: int) -> nn.ModuleDict:
    """Return one network, random."""
    structure = settings.get("layer_structure", [1, 2, 1])
    activation = settings.get("activation_func")
    dropouts = settings.get("dropout_structure") or [0] * len(structure)
    slots: list[nn.Module] = []
    for layer, (before, after) in enumerate(itertools.pairwise(structure)):
        slots.append(nn.Linear(int(width * before), int(width * after)))
        last = layer == len(structure) - 2
        if activation not in (None, "linear") and (not last or settings.get("activate_output", True)):
            slots.append(ACTIVATIONS[str(activation)]())
        if settings.get("is_layer_norm"):
            slots.append(nn.LayerNorm(int(width * after)))
        if dropouts[layer + 1]:
            slots.append(nn.Dropout(dropouts[layer + 1]))
    return nn.ModuleDict({"linear": nn.Sequential(*slots)})


def a1111(settings: Mapping[str, Any], widths: tuple[int, ...]) -> dict[Any, Any]:
    """Return what A1111 saves."""
    sides = {width: tuple(networks(settings, width).state_dict() for _ in range(2)) for width in widths}
    return {**sides, **settings}


def novelai(widths: tuple[int, ...]) -> dict[Any, Any]:
    """Return what NovelAI saved."""

    def side(width: int) -> dict[str, Tensor]:
        plain = nn.ModuleDict({"linear1": nn.Linear(width, 2 * width), "linear2": nn.Linear(2 * width, width)})
        return plain.state_dict()

    return {width: (side(width), side(width)) for width in widths}


def apply(network: nn.ModuleDict, values: Tensor, strength: float) -> Tensor:
    """Return what a layer reads in place of `values`."""
    changed: Tensor = network["linear"](values)
    return values + strength * changed


def random_linear(width: int, seed: int, layers: tuple[int, ...] = (1, 2, 1)) -> nn.ModuleDict:
    """Return a linear network whose effect can be seen."""
    torch.manual_seed(seed)
    made = networks({"layer_structure": layers}, width)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.6 / width**0.5)
    return made.eval()
