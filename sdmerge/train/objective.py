"""The denoising loss of a model: what training minimises, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sdmerge.train.losses import Schedule, snr_weights, squared_error
from sdmerge.train.networks import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sdmerge.train.batches import Batch
    from sdmerge.train.networks import Networks

_MOST_TEXTS = 4096


@dataclass
class Objective:
    """Predictions and losses of networks.

    Attributes:
        min_snr: see `losses.snr_weights`; 0: all steps count alike.
        told: what the UNet is told about a batch, in place of its captions; see `Trained`.
        reads_texts: whether gradients go through the text encoders; else what they say is kept.
    """

    networks: Networks
    schedule: Schedule
    min_snr: float = 0.0
    reads_texts: bool = False
    told: Callable[[Batch], Condition] | None = None
    _kept: dict[str, Condition] = field(default_factory=dict)

    def condition(self, captions: Sequence[str]) -> Condition:
        """Return what the UNet is told by captions, on its device."""
        if self.reads_texts:
            return self.networks.read(captions)
        for text in captions:
            if text not in self._kept:
                while len(self._kept) >= _MOST_TEXTS:
                    self._kept.pop(next(iter(self._kept)))
                with torch.no_grad():
                    self._kept[text] = self.networks.read([text])
        return Condition.stacked([self._kept[text] for text in captions]).to(self.networks.device)

    def predicted(self, batch: Batch, condition: Condition | None = None) -> Tensor:
        """Return what the UNet predicts for a batch, [n, 4, height, width]."""
        noisy = self.schedule.noisy(batch.latents, batch.noise, batch.when)
        told = condition
        if told is None:
            told = self.condition(batch.captions) if self.told is None else self.told(batch)
        return self.networks.predict(noisy, batch.when, told, batch.sizes)

    def error(self, predicted: Tensor, batch: Batch) -> Tensor:
        """Return the weighted squared error of a prediction, a scalar."""
        target = self.schedule.target(batch.latents, batch.noise, batch.when)
        weights = snr_weights(self.schedule, batch.when, self.min_snr)
        return squared_error(predicted, target, weights, batch.mask)

    def denoising(self, batch: Batch, condition: Condition | None = None) -> Tensor:
        """Return the denoising loss of a batch, a scalar; `condition` in place of its captions, where given."""
        return self.error(self.predicted(batch, condition), batch)
