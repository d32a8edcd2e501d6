"""LoRA and its relatives: small factors beside the weights of chosen layers, in any algorithm that can be baked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Conv2d, Linear

    from sdformats.adapters.record import Record
    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

_ATTENTION = r"unet\..*\.attn[12]\.to_(q|k|v|out\.0)"
_TRANSFORMER = r"unet\..*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\..*)"
_CONVOLUTIONS = r"unet\..*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv)"
TARGETS = {
    "attention": _ATTENTION,
    "transformer": _TRANSFORMER,
    "all": f"{_TRANSFORMER}|{_CONVOLUTIONS}",
}
"""Layers of the UNet by the names of their choice. ``transformer`` is what sd-scripts trains, ``all`` adds what LoCon does."""
_TEXT = r"te\d\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
ALGORITHMS = ("lora", "dora", "loha", "lokr", "glora", "ia3", "oft", "full")


@dataclass(frozen=True, kw_only=True)
class Lora(LoopMethod):
    """Small factors beside the weights of chosen layers; the model itself stays as it is."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA and its relatives: LoHa, LoKr, DoRA, GLoRA, IA3, OFT."
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-4, "weight_decay": 0.01}

    algo: Annotated[str, Param("the algorithm", choices=ALGORITHMS)] = "lora"
    rank: Annotated[int, Param("width of the factors; rows in a group for oft", 1, 4096)] = 16
    alpha: Annotated[float, Param("the change is multiplied with alpha / rank; 0: alpha is the rank", 0)] = 0.0
    factor: Annotated[int, Param("lokr: rows of the smaller factor at most; 0: near the square root", 0)] = 0
    targets: Annotated[str, Param("layers of the UNet", choices=tuple(TARGETS))] = "transformer"
    modules: Annotated[
        str | None, Param("a pattern of module names in place of targets, as unet\\..*\\.attn2\\..*")
    ] = None
    text_encoder: Annotated[bool, Param("train the text encoders' layers too")] = False
    text_lr: Annotated[float, Param("their learning rate; 0: half of lr", 0)] = 0.0
    to: Annotated[str | None, Param("the layout to write; `sdmerge layouts` lists them")] = None

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from sdmerge.train.inject import inject, trainable
        from sdmerge.train.records import Plan, untrained
        from sdmerge.train.saving import dtype_of

        records: dict[str, Record] = {}
        parameters, rates = {}, {}
        text_rate = 0.5 if not self.text_lr else self.text_lr / settings.optimizer.lr
        for path, layer in self._layers(networks):
            plan = Plan(layer.weight, self.rank, self.alpha or float(self.rank), self.factor, dtype_of(settings))
            records[path], fields = trainable(untrained(self.algo, plan))
            inject(layer, records[path])
            for field, parameter in fields.items():
                parameters[f"{path}.{field}"] = parameter
                if path.startswith("te"):
                    rates[f"{path}.{field}"] = text_rate
        return Trained(parameters, rates, reads_texts=bool(rates), state=records)

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdmerge.train.inject import finished
        from sdmerge.train.saving import save_adapter, texts_of

        modules = {path: finished(record) for path, record in trained.state.items()}
        return [save_adapter(modules, networks.family, self.to, texts_of(self, settings, saving), saving)]

    def _layers(self, networks: Networks) -> Iterator[tuple[str, Linear | Conv2d]]:
        """Yield the layers that are trained, by the names that adapters have for them."""
        from sdmerge.train.inject import layers

        wanted = [self.modules or TARGETS[self.targets], *([_TEXT] if self.text_encoder else [])]
        try:
            pattern = re.compile("|".join(wanted))
        except re.error as error:
            raise RequestError(f"modules is no pattern: {error}") from error
        for component, module in networks.modules.items():
            for path, layer in layers(module):
                inner = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                if pattern.fullmatch(f"{component}.{inner}"):
                    yield f"{component}.{inner}", layer


METHOD = Lora
