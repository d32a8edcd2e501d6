"""Hypernetworks that compute: what a file says as functions of torch, in front of a network's attention layers.

A layer that reads x reads x + s H(x) instead: H the network for the width of x, one for keys and one for values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter, functional

from sdformats.hypernetwork import Activation, Dropout, Hypernetwork, Linear, Norm
from sdformats.tensor import Spec
from sdmerge.errors import RequestError
from sdmerge.lora.held import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.nn import Module

    from sdformats.hypernetwork import Network, Settings
    from sdformats.tensor import DType
    from sdformats.views import Ref

    Pairs = Mapping[int, tuple[Network, Network]]

_SPREAD = 0.01
"""How wide normally distributed weights begin."""
_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "Normal": lambda weight: nn.init.normal_(weight, 0.0, _SPREAD),
    "XavierUniform": nn.init.xavier_uniform_,
    "XavierNormal": nn.init.xavier_normal_,
    "KaimingUniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="leaky_relu"),
    "KaimingNormal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="leaky_relu"),
}


def attach(unet: Module, pairs: Pairs, strength: float = 1.0) -> set[int]:
    """Put networks in front of keys and values; return the widths that layers have.

    Args:
        unet: a UNet of diffusers.
        pairs: networks by width, for keys and for values, of tensors in memory. They are looked up in every step, and may be
            put in later.
        strength: s.
    """
    widths = set()
    for path, layer in unet.named_modules():
        side = ("to_k", "to_v").index(name) if (name := path.rpartition(".")[2]) in ("to_k", "to_v") else None
        if side is not None and isinstance(layer, nn.Linear):
            widths.add(layer.in_features)
            layer.register_forward_pre_hook(_hook(pairs, layer.in_features, side, strength))
    return widths


def _hook(pairs: Pairs, width: int, side: int, strength: float) -> Callable[[Module, Any], Any]:
    def before(layer: Module, given: Any) -> Any:
        if width not in pairs:
            return None
        return (given[0] + strength * through(pairs[width][side], given[0], training=layer.training), *given[1:])

    return before


def through(network: Network, x: Tensor, *, training: bool = False) -> Tensor:
    """Return H(x)."""
    for slot in network:
        match slot:
            case Linear():
                x = functional.linear(x, _values(slot.weight, x), _values(slot.bias, x))
            case Norm():
                x = functional.layer_norm(x, x.shape[-1:], _values(slot.weight, x), _values(slot.bias, x))
            case Activation():
                x = activation(slot.name)(x)
            case Dropout():
                x = functional.dropout(x, slot.share, training)
    return x


def _values(ref: Ref, like: Tensor) -> Tensor:
    assert isinstance(ref, Held), "networks that compute are held in memory"
    return ref.values.to(like)


@cache
def activation(name: str) -> Module:
    """Return an activation by the name that A1111 gives it: torch's class in lower case, and ``swish`` for Hardswish.

    Raises:
        RequestError: torch has none of that name.
    """
    home = nn.modules.activation
    known = {key.lower(): kind for key, kind in vars(home).items() if getattr(kind, "__module__", "") == home.__name__}
    kind = {**known, "swish": nn.Hardswish}.get(name.lower())
    if kind is None:
        raise RequestError(f"the activation {name!r} is not known to torch")
    made: Module = kind()
    return made


def new_network(settings: Settings, width: int, stem: str, parameters: dict[str, Parameter]) -> Network:
    """Return an untrained network for a width, and add its parameters to `parameters` under names that begin with `stem`."""
    slots: list[Linear | Norm | Activation | Dropout] = []

    def held(name: str, values: Tensor) -> Held:
        parameters[f"{stem}.{len(slots)}.{name}"] = parameter = Parameter(values)
        return _held(parameter)

    for kind, layer in settings.slots():
        after = settings.width(width, layer + 1)
        if kind == "linear":
            weight = torch.empty(after, settings.width(width, layer))
            weight = _INITS[settings.weight_initialization or "Normal"](weight)
            slots.append(Linear(held("weight", weight), held("bias", torch.zeros(after))))
        elif kind == "norm":
            slots.append(Norm(held("weight", torch.ones(after)), held("bias", torch.zeros(after))))
        elif kind == "activation":
            slots.append(Activation(str(settings.activation)))
        else:
            slots.append(Dropout(settings.dropouts[layer + 1]))
    return tuple(slots)


def _held(values: Tensor, dtype: DType | None = None) -> Held:
    from sdformats.tensor import DType

    return Held(values, Spec(tuple(values.shape), dtype or DType.F32))


def changed(pairs: Pairs, change: Callable[[Ref], Ref]) -> dict[int, tuple[Network, Network]]:
    """Return networks with every tensor changed."""

    def one(slot: Any) -> Any:
        if not isinstance(slot, Linear | Norm):
            return slot
        return replace(slot, weight=change(slot.weight), bias=change(slot.bias))

    return {width: (tuple(map(one, keys)), tuple(map(one, values))) for width, (keys, values) in pairs.items()}


def finished(pairs: Pairs, settings: Settings, texts: Mapping[str, str], dtype: DType) -> Hypernetwork:
    """Return a record of plain tensors, to be written."""

    def plain(ref: Ref) -> Ref:
        assert isinstance(ref, Held), "trained in memory"
        return _held(ref.values.detach().float().cpu(), dtype)

    return Hypernetwork(changed(pairs, plain), settings, extras=texts)


def in_memory(record: Hypernetwork) -> Pairs:
    """Read a hypernetwork's tensors, so that it can compute."""
    from sdmerge.lora.refs import value

    return changed(record.networks, lambda ref: _held(value(ref).float()))
