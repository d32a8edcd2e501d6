"""Fine-tuning: the model's own weights, all of them or the parts that are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Trained

if TYPE_CHECKING:
    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Finetune(LoopMethod):
    """The weights of the UNet, and perhaps of the text encoders."""

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning: the model's own weights."
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-5}

    modules: Annotated[str | None, Param("a pattern of tensor names to train, as unet\\..*attn2.*; else all")] = None
    text_encoder: Annotated[bool, Param("train the text encoders too")] = False
    extract: Annotated[
        str | None, Param("write a LoRA of the change too, as rank=64, size=64MB, energy=0.9 or error=0.2")
    ] = None

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        try:
            pattern = re.compile(self.modules or ".*")
        except re.error as error:
            raise RequestError(f"modules is no pattern: {error}") from error
        found = {}
        for component, module in networks.modules.items():
            if component != "unet" and not self.text_encoder:
                continue
            for name, parameter in module.named_parameters():
                if pattern.fullmatch(f"{component}.{name}"):
                    parameter.requires_grad_(True)
                    found[f"{component}.{name}"] = parameter
        return Trained(found, reads_texts=any(name.startswith("te") for name in found))

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdmerge.train.saving import extracted, save_model, texts_of

        reports = [save_model(trained.parameters, settings, texts_of(self, settings, saving), saving)]
        if self.extract is not None:
            reports += extracted(self.extract, settings, saving)
        return reports


METHOD = Finetune
