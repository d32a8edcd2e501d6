"""DreamBooth: the model's own weights, on a few pictures of one thing that a rare word is for, beside pictures of its class.

Source: Ruiz et al., "DreamBooth" (2022): L + λ L_prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sdmerge.train.finetune import Finetune
from sdmerge.train.prior import WithPrior


@dataclass(frozen=True, kw_only=True)
class Dreambooth(WithPrior, Finetune):
    """The weights of the UNet, and perhaps of the text encoders, on pictures of one thing beside pictures of its class.

    Captions name the thing by a rare word and its class, as 'a sks dog'; one for all of them is given with --caption. The data
    may be a folder with the subfolders instance and class.
    """

    name: ClassVar[str] = "dreambooth"
    title: ClassVar[str] = "DreamBooth: one thing, taught to the whole model, with its class preserved."
    defaults: ClassVar[dict[str, Any]] = {"lr": 2e-6, "steps": 800}


METHOD = Dreambooth
