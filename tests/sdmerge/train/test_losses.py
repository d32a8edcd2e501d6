"""The noise schedule, its targets and weights, against diffusers and the papers' formulas."""

from __future__ import annotations

import diffusers
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.train.losses import Schedule, schedule_of, snr_weights, squared_error, zero_terminal
from sdmerge.train.settings import LossSettings

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, 4, 3, 3, generator=source) for _ in range(2))
    return latents, noise, torch.tensor([0, 10, 400, 998, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_schedule_is_that_of_diffusers(prediction: str, kind: str) -> None:
    theirs = diffusers.DDPMScheduler(**CONFIG | {"beta_schedule": kind}, prediction_type=prediction)
    ours = schedule_of(CONFIG | {"beta_schedule": kind}, LossSettings(), prediction)
    latents, noise, when = batch()
    torch.testing.assert_close(ours.noisy(latents, noise, when), theirs.add_noise(latents, noise, when))
    target = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, when)
    torch.testing.assert_close(ours.target(latents, noise, when), target)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    theirs = diffusers.DDIMScheduler(**CONFIG, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = schedule_of(CONFIG, LossSettings(zero_snr=True), "v_prediction")
    torch.testing.assert_close(ours.kept[:-1].float(), theirs.alphas_cumprod[:-1], atol=2e-6, rtol=1e-3)
    assert float(ours.kept[-1]) == 0
    assert float(zero_terminal(ours.kept)[0]) == pytest.approx(float(ours.kept[0]))
    assert torch.isfinite(ours.snr(torch.arange(1000))).all()


def test_weights_by_snr() -> None:
    schedule = Schedule(torch.tensor([0.99, 0.5, 0.1], dtype=torch.float64), "epsilon")
    when = torch.tensor([0, 1, 2])
    torch.testing.assert_close(snr_weights(schedule, when, 5.0), torch.tensor([5 / 99, 1.0, 1.0]))
    velocity = Schedule(schedule.kept, "v_prediction")
    torch.testing.assert_close(snr_weights(velocity, when, 5.0), torch.tensor([5 / 100, 0.5, (1 / 9) / (10 / 9)]))
    assert snr_weights(schedule, when, 0.0).tolist() == [1, 1, 1]


def test_masked_error_counts_what_the_mask_shows() -> None:
    predicted, target = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    target[0, :, 0, 0] = 3.0
    mask = torch.zeros(2, 1, 2, 2)
    mask[:, :, 0, 0] = 1.0
    ones = torch.ones(2)
    assert float(squared_error(predicted, target, ones, mask)) == pytest.approx((9 + 1) / 2)
    assert float(squared_error(predicted, target, ones)) == pytest.approx(((9 + 3) / 4 + 1) / 2)
    assert float(squared_error(predicted, target, torch.tensor([1.0, 0.0]), mask)) == pytest.approx(4.5)
    assert float(squared_error(predicted, target, ones, torch.zeros(2, 1, 2, 2))) == 0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(RequestError, match="zero_snr"):
        schedule_of(CONFIG, LossSettings(zero_snr=True), "epsilon")
    with pytest.raises(RequestError, match="squaredcos"):
        schedule_of(CONFIG | {"beta_schedule": "squaredcos_cap_v2"}, LossSettings(), "auto")
    with pytest.raises(RequestError, match="sample"):
        schedule_of(CONFIG | {"prediction_type": "sample"}, LossSettings(), "auto")
