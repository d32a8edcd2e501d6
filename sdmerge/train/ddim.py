"""DDIM, both ways: from noise to a picture and, by the same formula, from a picture to the noise that leads to it.

Song, Meng and Ermon (2020), equation 12 with σ = 0, as diffusers' ``DDIMScheduler`` spaces its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdmerge.errors import RequestError
from sdmerge.train.losses import parted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from sdmerge.train.losses import Schedule


@dataclass(frozen=True)
class Ladder:
    """A few levels of noise, from a clean picture up to noise.

    Attributes:
        when: [n] the steps at which the network is asked, the least noisy first.
        kept: [n + 1] float64, ᾱ of each level; ``kept[i + 1]`` belongs to ``when[i]``.
        prediction: what the network predicts.
    """

    when: Tensor
    kept: Tensor
    prediction: str

    @property
    def steps(self) -> int:
        """How many steps lead from one end to the other."""
        return len(self.when)

    def up(self, latents: Tensor, predicted: Tensor, step: int) -> Tensor:
        """Return latents one level noisier, from `step` to `step` + 1."""
        return self._moved(latents, predicted, step, step + 1)

    def down(self, latents: Tensor, predicted: Tensor, step: int) -> Tensor:
        """Return latents one level cleaner, from `step` + 1 to `step`."""
        return self._moved(latents, predicted, step + 1, step)

    def _moved(self, latents: Tensor, predicted: Tensor, start: int, end: int) -> Tensor:
        here, there = (float(self.kept[level]) for level in (start, end))
        clean, noise = parted(latents, predicted, here**0.5, (1 - here) ** 0.5, self.prediction)
        found: Tensor = there**0.5 * clean + (1 - there) ** 0.5 * noise
        return found


def ladder(schedule: Schedule, config: Mapping[str, Any], steps: int) -> Ladder:
    """Return evenly spaced levels.

    Args:
        schedule: the noise of every training step.
        config: the scheduler's, as diffusers writes it: ``steps_offset`` and ``set_alpha_to_one`` count.
        steps: how many.

    Raises:
        RequestError: there are fewer steps in the schedule.
    """
    if not 1 <= steps <= schedule.steps:
        raise RequestError(f"steps is {steps:,} (expected 1 to {schedule.steps:,})")
    offset = int(config.get("steps_offset", 0))
    when = (torch.arange(steps) * (schedule.steps // steps) + offset).clamp(max=schedule.steps - 1)
    last = torch.ones(1, dtype=torch.float64) if config.get("set_alpha_to_one", True) else schedule.kept[:1]
    return Ladder(when, torch.cat([last, schedule.kept[when]]), schedule.prediction)
