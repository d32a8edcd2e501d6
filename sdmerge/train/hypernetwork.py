"""Hypernetworks: small networks that change what the attention layers read, one for keys and one for values of each width.

Source: A1111's web UI; in training the strength is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Trained

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Parameter

    from sdformats import hypernetwork as files
    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

ACTIVATIONS = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "gelu", "mish")
INITS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")


@dataclass(frozen=True, kw_only=True)
class Hypernetwork(LoopMethod):
    """Small networks that change what the attention layers read; the model itself stays as it is."""

    name: ClassVar[str] = "hypernetwork"
    title: ClassVar[str] = "Hypernetworks: small networks in front of keys and values."
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-5, "steps": 3000}

    layers: Annotated[str, Param("widths of the layers as multiples of the input's, beginning and ending with 1")] = (
        "1,2,1"
    )
    activation: Annotated[
        str, Param("between the layers; linear ones can be folded into a model", choices=ACTIVATIONS)
    ] = "linear"
    activate_output: Annotated[bool, Param("activate behind the last layer, too")] = False
    layer_norm: Annotated[bool, Param("normalise behind each layer")] = False
    dropout: Annotated[float, Param("what is dropped behind each layer but the last, in training", 0, 0.9)] = 0.0
    init: Annotated[str, Param("how weights begin", choices=INITS)] = "Normal"
    widths: Annotated[str | None, Param("widths of the layers that are changed, as 768,320; else all")] = None
    to: Annotated[str, Param("the layout to write", choices=("a1111", "novelai"))] = "a1111"

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from sdmerge.train.hypernetwork_layers import attach, new_network

        chosen = self._settings(settings, 0)
        found: dict[int, tuple[files.Network, files.Network]] = {}
        parameters: dict[str, Parameter] = {}
        wanted = None if self.widths is None else set(_numbers("widths", self.widths, int))
        for width in sorted(attach(networks.unet, found)):
            if wanted is not None and width not in wanted:
                continue
            pair = [new_network(chosen, width, f"{width}.{side}", parameters) for side in (0, 1)]
            found[width] = (pair[0], pair[1])
        if wanted is not None and (missing := wanted - found.keys()):
            raise RequestError(f"widths names {min(missing)}, which no attention layer of the model reads")
        return Trained(parameters, state=found)

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdformats.hypernetwork import WRITERS
        from sdmerge.train.hypernetwork_layers import finished
        from sdmerge.train.saving import dtype_of, save_small, texts_of

        texts = texts_of(self, settings, saving)
        record = finished(trained.state, self._settings(settings, saving.step), texts, dtype_of(settings))
        return [save_small(WRITERS[self.to](record), networks.family, saving)]

    def _settings(self, settings: Settings, step: int) -> files.Settings:
        from pathlib import Path

        from sdformats.hypernetwork import Settings as Kept

        structure = tuple(_numbers("layers", self.layers, float))
        if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1 or min(structure) <= 0:
            raise RequestError(f"layers is {self.layers!r} (expected multiples that begin and end with 1, as 1,2,1)")
        dropouts = (0, *(self.dropout,) * (len(structure) - 2), 0) if self.dropout else None
        return Kept(
            step=step,
            name=Path(settings.output.output).stem,
            layer_structure=structure,
            activation_func=self.activation,
            is_layer_norm=self.layer_norm,
            weight_initialization=self.init,
            sd_checkpoint_name=Path(settings.model.model).name,
            activate_output=self.activate_output,
            use_dropout=bool(self.dropout),
            dropout_structure=dropouts,
        )


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{name} is {text!r} (expected numbers with commas between them)") from None
    return [int(one) if one == int(one) else one for one in numbers]


METHOD = Hypernetwork
