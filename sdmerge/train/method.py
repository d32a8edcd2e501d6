"""What a training method is: what is trained, how it is put into the networks, and what is saved.

A method is one file with a class called ``METHOD``, a dataclass over `LoopMethod`. Its fields are options, annotated as
those of `sdmerge.train.settings` are. All else (data, noise, the loop, saving, resuming, painting) is the same for every
method; one that needs it otherwise overrides one of the functions below, and one that has no use for the loop stands on
`TrainingMethod` and says how it runs. Do not import torch at the top of its file: help texts do not wait for it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sdmerge.errors import RequestError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Parameter

    from sdmerge.execute import Report
    from sdmerge.train.batches import Batch
    from sdmerge.train.data import Item
    from sdmerge.train.log import Tell
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Condition, Networks
    from sdmerge.train.objective import Objective
    from sdmerge.train.settings import Settings

METHODS = {
    "finetune": "sdmerge.train.finetune",
    "dreambooth": "sdmerge.train.dreambooth",
    "lora": "sdmerge.train.lora",
    "custom-diffusion": "sdmerge.train.custom_diffusion",
    "hypernetwork": "sdmerge.train.hypernetwork",
    "textual-inversion": "sdmerge.train.textual_inversion",
    "dream-artist": "sdmerge.train.dream_artist",
    "aesthetic": "sdmerge.train.aesthetic",
    "null-text": "sdmerge.train.null_text",
    "clip-inversion": "sdmerge.train.clip_inversion",
    "image-variation": "sdmerge.train.image_variation",
}
"""Every method: its name, and the module that has it as ``METHOD``."""


@dataclass(frozen=True)
class Part:
    """A folder of pictures that batches are made of.

    Attributes:
        caption: that of pictures which have none.
        weight: what their loss is multiplied with.
    """

    folder: Path
    caption: str | None = None
    weight: float = 1.0


@dataclass
class Trained:
    """What a method trains.

    Attributes:
        parameters: by name; the optimizer, the average and the saved states have them so.
        rates: learning rates that differ, by parameter: factors of the run's.
        told: what the UNet is told about a batch; None: what the text encoders make of its captions.
        reads_texts: whether gradients go through the text encoders, so that captions are read in every step.
        state: whatever the method needs again when it saves.
    """

    parameters: Mapping[str, Parameter]
    rates: Mapping[str, float] = field(default_factory=dict)
    reads_texts: bool = False
    told: Callable[[Batch], Condition] | None = None
    state: Any = None


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(ABC):
    """A method, with its options."""

    name: ClassVar[str]
    """What users call it."""
    title: ClassVar[str]
    """One line about it, for help texts."""
    defaults: ClassVar[dict[str, Any]] = {}
    """Settings whose usual value differs for this method."""
    takes: ClassVar[tuple[str, ...]] = ()
    """The shared settings that it takes; none named: all of them."""

    @abstractmethod
    def run(self, settings: Settings, tell: Tell) -> list[Report]:
        """Train, and write what was trained.

        Raises:
            sdmerge.errors.SdmergeError, sdformats.errors.FormatError: it cannot be done.
        """


@dataclass(frozen=True, kw_only=True)
class LoopMethod(TrainingMethod):
    """A method that trains by the loop that all share."""

    captions: ClassVar[bool] = True
    """Whether pictures need captions."""

    def parts(self, settings: Settings, networks: Networks, tell: Tell) -> tuple[Part, ...]:
        """Return the folders that are trained on; a batch has pictures of each."""
        from pathlib import Path

        return (Part(Path(settings.data.data), settings.data.caption if self.captions else ""),)

    def check(self, items: Sequence[Item]) -> None:
        """Refuse pictures that the method cannot learn from.

        Raises:
            sdmerge.train.data.DataProblems: everything that is wrong with them.
        """

    def variants(self) -> int:
        """Return in how many ways a picture is shown; the first is as it is."""
        return 1

    def vary(self, picture: Image, variant: int) -> Image:
        """Return a picture as it is shown; where its alpha channel is 0, nothing is learned from it."""
        return picture

    def caption(self, text: str, variant: int, source: torch.Generator) -> str:
        """Return what the network is told about a picture with this caption, shown so."""
        return text

    @abstractmethod
    def attach(self, networks: Networks, settings: Settings) -> Trained:
        """Put what is trained into the networks, which are frozen."""

    def loss(self, objective: Objective, batch: Batch) -> Tensor:
        """Return what is minimised, a scalar."""
        return objective.denoising(batch)

    def figures(self, trained: Trained) -> dict[str, float]:
        """Return what is shown and logged after each step, beside the loss."""
        return {}

    def after_step(self, trained: Trained) -> None:
        """Do what is to be done after each step of the optimizer."""

    @abstractmethod
    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        """Write what was trained."""

    def run(self, settings: Settings, tell: Tell) -> list[Report]:
        from sdmerge.train.loop import train

        return train(self, settings, tell)


def find(name: str) -> type[TrainingMethod]:
    """Return a method's class.

    Raises:
        RequestError: there is none of that name; the nearest is named.
    """
    if name not in METHODS:
        raise RequestError(f"there is no training method {name!r}{nearest(name, METHODS)}")
    found: type[TrainingMethod] = importlib.import_module(METHODS[name]).METHOD
    return found
