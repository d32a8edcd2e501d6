"""Put trained changes of weights into a network: any algorithm that a neutral adapter has a record for.

A record's tensors are parameters here, so that `sdmerge.lora.delta` computes its change differentiably: what is trained is by
construction what baking adds. LoRA has a path of its own, which never makes the change as a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Conv2d, Linear, Parameter
from torch.nn.functional import conv2d, linear

from sdformats.adapters.records import LoRA
from sdkernels.lora_linear import lora_linear
from sdmerge.lora.delta import delta, needs_weight
from sdmerge.lora.held import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.nn import Module

    from sdformats.adapters.record import Record
    from sdformats.views import Ref


def layers(module: Module) -> Iterator[tuple[str, Linear | Conv2d]]:
    """Yield the layers that have a weight matrix, by path."""
    for path, layer in module.named_modules():
        if isinstance(layer, Linear | Conv2d):
            yield path, layer


def trainable(record: Record) -> tuple[Record, dict[str, Parameter]]:
    """Return a record whose tensors are parameters, and these by the names of their fields."""
    found: dict[str, Parameter] = {}

    def made(ref: Ref) -> Ref:
        assert isinstance(ref, Held), "new records are held in memory"
        parameter = Parameter(ref.values)
        return Held(parameter, ref.spec)

    changed = record.map(made)
    for name, ref in changed.refs:
        assert isinstance(ref, Held), "made above"
        assert isinstance(ref.values, Parameter), "made above"
        found[name] = ref.values
    return changed, found


def inject(layer: Linear | Conv2d, record: Record) -> None:
    """Let a layer compute with its weight changed by a record of parameters, until `restore`."""
    layer.forward = _forward(layer, record)  # type: ignore[method-assign, assignment]


def restore(layer: Module) -> None:
    """Undo `inject`."""
    layer.__dict__.pop("forward", None)


def _forward(layer: Linear | Conv2d, record: Record) -> Callable[[Tensor], Tensor]:
    plain = isinstance(record, LoRA) and record.mid is None and record.magnitude is None and record.bias is None
    if plain and isinstance(layer, Linear):
        return _lora_linear(layer, record)
    if plain and isinstance(layer, Conv2d) and layer.groups == 1:
        return _lora_conv(layer, record)
    return _changed(layer, record)


def _values(ref: Ref) -> Any:
    assert isinstance(ref, Held), "injected records are held in memory"
    return ref.values


def _lora_linear(layer: Linear, record: Record) -> Callable[[Tensor], Tensor]:
    assert isinstance(record, LoRA), "asked for"
    down, up, scale = _values(record.down), _values(record.up), record.scale

    def forward(x: Tensor) -> Tensor:
        return lora_linear(x, layer.weight, down, up, scale, layer.bias)

    return forward


def _lora_conv(layer: Conv2d, record: Record) -> Callable[[Tensor], Tensor]:
    assert isinstance(record, LoRA), "asked for"
    down, up, scale = _values(record.down), _values(record.up), record.scale

    def forward(x: Tensor) -> Tensor:
        narrow = conv2d(x, down.to(x.dtype), None, layer.stride, layer.padding, layer.dilation)
        plain: Tensor = Conv2d.forward(layer, x)
        return plain + conv2d(narrow, up.to(x.dtype)) * scale

    return forward


def _changed(layer: Linear | Conv2d, record: Record) -> Callable[[Tensor], Tensor]:
    """Compute with W + ΔW, for algorithms whose change is no narrow product."""
    of_weight = needs_weight(record)

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        wide = weight.float()
        made = delta(record, _values, wide if of_weight else None, None if of_weight else tuple(weight.shape))
        changed = (wide + made).to(weight.dtype)
        if isinstance(layer, Linear):
            return linear(x, changed, layer.bias)
        found: Tensor = layer._conv_forward(x, changed, layer.bias)
        return found

    return forward


def finished(record: Record) -> Record:
    """Return a record with plain tensors in float32, on the CPU, in place of its parameters: to be written."""
    return record.map(lambda ref: Held(_values(ref).detach().float().cpu(), ref.spec))
