"""Paint pictures with a model, to look at it: classifier-free guidance over one of diffusers' schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdmerge.applied import Applied
from sdmerge.errors import RequestError
from sdmerge.train.losses import V
from sdmerge.train.networks import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from sdmerge.train.networks import Networks

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
"""diffusers' classes by the names that users give, and what is set otherwise than the model's configuration says."""


@dataclass(frozen=True, kw_only=True)
class Painting:
    """How pictures are painted.

    Attributes:
        steps: of the scheduler.
        guidance: scale of classifier-free guidance; 1: none.
        negative: the text to keep away from.
        width, height: in pixels; 0: the model's.
        scheduler: one of `SCHEDULERS`.
        prediction: what the network predicts; ``auto``: as the model's configuration says.
        zero_snr: whether the last step is noise alone.
    """

    steps: int = 30
    guidance: float = 7.0
    negative: str = ""
    width: int = 0
    height: int = 0
    scheduler: str = "ddim"
    prediction: str = "auto"
    zero_snr: bool = False


@torch.no_grad()
def paint(
    networks: Networks,
    prompts: Sequence[str],
    seeds: Sequence[int],
    painting: Painting,
    advance: Callable[[int], None] = lambda _: None,
    applied: Applied | None = None,
) -> list[Image]:
    """Paint a picture for each prompt and its seed.

    Args:
        networks: the model; it is left as it is.
        prompts, seeds: one of each for every picture. A picture does not depend on those beside it.
        advance: called with 1 after each picture.
        applied: what changes pictures beside the weights.
    """
    painted = []
    beside = applied or Applied()
    painting = beside.changed(painting)
    for prompt, seed in zip(prompts, seeds, strict=True):
        told, against = beside.told(networks, prompt), beside.against(networks, painting.negative)
        noise = noise_of(networks, seed, painting) if beside.noise is None else beside.noise
        latents = denoised(networks, told, against, noise, painting)
        painted += pictures_of(networks, latents)
        advance(1)
    return painted


def noise_of(networks: Networks, seed: int, painting: Painting) -> Tensor:
    """Return the noise that a picture begins with, [1, 4, height, width]: the same on every device.

    Raises:
        RequestError: the size is none that the networks can paint.
    """
    unit = networks.factor * 8
    sides = [painting.height or networks.resolution, painting.width or networks.resolution]
    if any(side % networks.factor or side <= 0 for side in sides):
        raise RequestError(f"pictures of {sides[1]}x{sides[0]} cannot be painted (expected multiples of {unit})")
    source = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, *(side // networks.factor for side in sides), generator=source)


def denoised(
    networks: Networks, told: Condition, against: Condition | Sequence[Condition], noise: Tensor, painting: Painting
) -> Tensor:
    """Return the latents of pictures, [n, 4, height, width], beginning with noise of that shape.

    Args:
        told: what is wanted.
        against: what is not, in all steps or in each.
    """
    scheduler = scheduler_for(networks, painting)
    device, dtype = networks.device, networks.unet.dtype
    latents = noise.to(device) * scheduler.init_noise_sigma
    guided = painting.guidance != 1
    each = [against] * len(scheduler.timesteps) if isinstance(against, Condition) else against
    sizes = _sizes(networks, noise).to(device)
    for when, one in zip(scheduler.timesteps, each, strict=True):
        both = Condition.stacked([one, told] if guided else [told]).to(device)
        seen = scheduler.scale_model_input(latents, when)
        batch = torch.cat([seen, seen]) if guided else seen
        steps = when.to(device).expand(len(batch))
        predicted = networks.predict(batch.to(dtype), steps, both, sizes.expand(len(batch), 6)).float()
        if guided:
            without, with_it = predicted.chunk(2)
            predicted = without + painting.guidance * (with_it - without)
        latents = scheduler.step(predicted, when, latents).prev_sample
    found: Tensor = latents
    return found


def scheduler_for(networks: Networks, painting: Painting) -> Any:
    """Return a scheduler of diffusers, set to its steps.

    Raises:
        RequestError: there is none of that name.
    """
    import diffusers

    if painting.scheduler not in SCHEDULERS:
        raise RequestError(f"scheduler is {painting.scheduler!r} (expected one of {', '.join(SCHEDULERS)})")
    name, changes = SCHEDULERS[painting.scheduler]
    config = dict(networks.scheduler) | changes
    if painting.prediction != "auto":
        config["prediction_type"] = painting.prediction
    if painting.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if config.get("prediction_type") == V and painting.scheduler == "ddim":
        config["clip_sample"] = False
    made = getattr(diffusers, name).from_config(config)
    made.set_timesteps(painting.steps)
    return made


def _sizes(networks: Networks, noise: Tensor) -> Tensor:
    """Return SDXL's numbers for an original that is not cut, [1, 6]."""
    height, width = (float(side * networks.factor) for side in noise.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]])


def pictures_of(networks: Networks, latents: Tensor) -> list[Image]:
    """Decode latents [n, 4, height, width]."""
    from PIL import Image

    values = networks.decode(latents)
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in pixels]
