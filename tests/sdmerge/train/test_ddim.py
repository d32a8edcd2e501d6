"""DDIM both ways, held against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.train.ddim import ladder
from sdmerge.train.losses import schedule_of
from sdmerge.train.settings import LossSettings

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
def test_steps_are_diffusers(prediction: str, to_one: bool) -> None:
    config = CONFIG | {"prediction_type": prediction, "set_alpha_to_one": to_one}
    levels = ladder(schedule_of(config, LossSettings(), "auto"), config, 7)
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(7)
    assert theirs.timesteps.tolist() == levels.when.flip(0).tolist()
    latents, predicted = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for step, when in zip(reversed(range(7)), theirs.timesteps, strict=True):
        wanted = theirs.step(predicted, when, latents).prev_sample
        found = levels.down(latents, predicted, step)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(levels.up(found, predicted, step), latents, atol=1e-4, rtol=1e-4) if (
            prediction == "epsilon"
        ) else None
        latents = wanted


def test_no_such_steps() -> None:
    with pytest.raises(RequestError, match="steps is"):
        ladder(schedule_of(CONFIG, LossSettings(), "auto"), CONFIG, 1001)
