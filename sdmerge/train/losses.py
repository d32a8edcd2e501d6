"""What is minimised: the noise schedule, what the network should predict, and how much each picture counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from sdmerge.train.settings import LossSettings

EPSILON, V = "epsilon", "v_prediction"


@dataclass(frozen=True)
class Schedule:
    """How much of the picture is left at each step.

    Attributes:
        kept: ᾱ, [steps] float64: the share of the picture's variance.
        prediction: what the network predicts, ``epsilon`` or ``v_prediction``.
    """

    kept: Tensor
    prediction: str

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.kept)

    def noisy(self, latents: Tensor, noise: Tensor, when: Tensor) -> Tensor:
        """Return √ᾱ x + √(1 - ᾱ) ε.

        Args:
            latents, noise: [n, channels, height, width].
            when: [n] steps.
        """
        signal, spread = self._parts(latents, when)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, when: Tensor) -> Tensor:
        """Return what the network should predict: ε, or v = √ᾱ ε - √(1 - ᾱ) x (Salimans and Ho 2022)."""
        if self.prediction == EPSILON:
            return noise
        signal, spread = self._parts(latents, when)
        return signal * noise - spread * latents

    def clean(self, noisy: Tensor, predicted: Tensor, when: Tensor) -> Tensor:
        """Return the clean latents that a prediction for noisy ones means."""
        signal, spread = self._parts(noisy, when)
        return parted(noisy, predicted, signal, spread, self.prediction)[0]

    def snr(self, when: Tensor) -> Tensor:
        """Return ᾱ / (1 - ᾱ) of steps, [n] float64."""
        kept = self.kept.to(when.device)[when]
        return kept / (1 - kept)

    def _parts(self, latents: Tensor, when: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(when.device)[when].reshape(-1, *(1,) * (latents.dim() - 1))
        return kept.sqrt().to(latents), (1 - kept).sqrt().to(latents)


def parted(
    noisy: Tensor, predicted: Tensor, signal: Tensor | float, spread: Tensor | float, prediction: str
) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise that noisy ones are made of, as a prediction has it.

    Args:
        noisy, predicted: [n, channels, height, width].
        signal, spread: √ᾱ and √(1 - ᾱ).
        prediction: what is predicted, ε or v.
    """
    if prediction == EPSILON:
        return (noisy - spread * predicted) / signal, predicted
    return signal * noisy - spread * predicted, signal * predicted + spread * noisy


def schedule_of(config: Mapping[str, Any], settings: LossSettings, prediction: str) -> Schedule:
    """Make the schedule that a scheduler's configuration describes.

    Args:
        config: as diffusers writes it.
        settings: whether the last step is to be noise alone.
        prediction: ``auto`` takes the configuration's.

    Raises:
        RequestError: zero_snr with a network that predicts the noise, or a schedule that is not known here.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
    kind = config.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
    else:
        raise RequestError(f"the schedule of noise is {kind!r} (expected scaled_linear or linear)")
    kept = torch.cumprod(1 - betas, 0)
    found = str(config.get("prediction_type", EPSILON)) if prediction == "auto" else prediction
    if found not in (EPSILON, V):
        raise RequestError(f"the network predicts {found!r} (expected {EPSILON} or {V})")
    if settings.zero_snr or config.get("rescale_betas_zero_snr"):
        if found == EPSILON:
            raise RequestError("zero_snr leaves nothing to learn in the last step of a network that predicts noise")
        kept = zero_terminal(kept)
    return Schedule(kept, found)


def zero_terminal(kept: Tensor) -> Tensor:
    """Shift and stretch √ᾱ so that its last value is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
    roots = kept.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


def snr_weights(schedule: Schedule, when: Tensor, gamma: float) -> Tensor:
    """Return min(SNR, γ) / SNR, or / (SNR + 1) for v (Hang et al. 2023), [n] float32; ones where γ is 0."""
    if gamma == 0:
        return torch.ones(len(when), device=when.device)
    snr = schedule.snr(when)
    below = snr if schedule.prediction == EPSILON else snr + 1
    return (snr.clamp(max=gamma) / below.clamp(min=torch.finfo(snr.dtype).tiny)).float()


def squared_error(predicted: Tensor, target: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over pictures of weight · mean squared error, a scalar in float32.

    Args:
        predicted, target: [n, channels, height, width].
        weights: [n].
        mask: [n, 1, height, width]: how much each place counts; a picture's places are averaged by it.
    """
    wrong = (predicted.float() - target.float()) ** 2
    if mask is None:
        each = wrong.flatten(1).mean(1)
    else:
        share = mask.flatten(1).mean(1).clamp(min=1e-6)
        each = (wrong * mask).flatten(1).mean(1) / share
    return (each * weights).mean()
