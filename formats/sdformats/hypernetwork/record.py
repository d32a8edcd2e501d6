"""What a hypernetwork is: its settings, and what its networks are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdformats.views import Ref

_OLD_DROPOUT = 0.3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What A1111 keeps beside the networks, under the names it has there. The defaults are what a missing key means.

    Attributes:
        layer_structure: the width behind each layer as a multiple of the context's, beginning with that of the context.
        activation_func: a torch activation in lower case, ``swish`` for Hardswish; None or ``linear``: none.
        activate_output: whether it also stands behind the last layer.
        dropout_structure: the share of numbers that is dropped behind each layer in training, with one more 0 in front;
            None: as `use_dropout` and `last_layer_dropout` say, 0.3.
    """

    step: int = 0
    name: str | None = None
    layer_structure: tuple[int | float, ...] = (1, 2, 1)
    activation_func: str | None = None
    is_layer_norm: bool = False
    weight_initialization: str | None = "Normal"
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    activate_output: bool = True
    use_dropout: bool = False
    dropout_structure: tuple[int | float, ...] | None = None
    last_layer_dropout: bool = False
    optional_info: str | None = None

    @property
    def activation(self) -> str | None:
        """The activation that there is."""
        return None if self.activation_func in (None, "linear") else self.activation_func

    @property
    def dropouts(self) -> tuple[int | float, ...]:
        """The share dropped behind each layer, with a 0 in front, as A1111 reads files that only say whether."""
        count = len(self.layer_structure)
        if self.dropout_structure is not None or not self.use_dropout:
            return self.dropout_structure or (0,) * count
        last = _OLD_DROPOUT if self.last_layer_dropout else 0
        return (0, *(_OLD_DROPOUT,) * (count - 3), last, 0)[:count]

    def slots(self) -> Iterator[tuple[str, int]]:
        """Yield what stands in a network, one after the other, each with the number of the layer it belongs to."""
        last = len(self.layer_structure) - 2
        for layer in range(last + 1):
            yield "linear", layer
            if self.activation is not None and (layer < last or self.activate_output):
                yield "activation", layer
            if self.is_layer_norm:
                yield "norm", layer
            if self.dropouts[layer + 1] > 0:
                yield "dropout", layer

    def width(self, context: int, layer: int) -> int:
        """Return the width in front of a layer."""
        return int(context * self.layer_structure[layer])


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight (out, in), bias (out,)."""

    weight: Ref
    bias: Ref


@dataclass(frozen=True)
class Norm:
    """A layer norm over all of (width,)."""

    weight: Ref
    bias: Ref


@dataclass(frozen=True)
class Activation:
    """An activation, by A1111's name."""

    name: str


@dataclass(frozen=True)
class Dropout:
    """What is dropped in training; nothing, when it is used."""

    share: float


Slot = Linear | Norm | Activation | Dropout
Network = tuple[Slot, ...]


@dataclass(frozen=True)
class Hypernetwork:
    """Everything that a file says.

    Attributes:
        networks: by width of the context, those for the keys and for the values.
        settings: what A1111 keeps; NovelAI's files have the defaults.
        extras: other texts.
        notes: what a user should know about how it was read.
    """

    networks: Mapping[int, tuple[Network, Network]]
    settings: Settings
    extras: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bends(self) -> str | None:
        """What makes it more than a linear map, in words; None where it is one."""
        found = []
        if any(kind == "activation" for kind, _ in self.settings.slots()):
            found.append(f"the activation {self.settings.activation}")
        if self.settings.is_layer_norm:
            found.append("layer norms")
        return " and ".join(found) or None
