"""Find the noise, and the unconditional embeddings, from which guided sampling paints a given picture again.

Mokady et al. (2022), *Null-text inversion*; Miyake et al. (2023), *Negative-prompt inversion*.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import mse_loss

from sdmerge.train.networks import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sdmerge.train.ddim import Ladder
    from sdmerge.train.networks import Networks

_RATE = 1e-2


@torch.no_grad()
def inverted(networks: Networks, levels: Ladder, latents: Tensor, told: Condition) -> list[Tensor]:
    """Return the way from a picture to noise without guidance, the pivot: latents of every level, the clean ones first.

    Args:
        latents: [1, 4, height, width].
        told: what is on the picture.
    """
    way = [latents]
    for step in range(levels.steps):
        way.append(levels.up(way[-1], _predicted(networks, levels, way[-1], step, told), step))
    return way


def optimised(
    networks: Networks,
    levels: Ladder,
    way: Sequence[Tensor],
    told: Condition,
    empty: Condition,
    *,
    guidance: float,
    inner: int = 10,
    tolerance: float = 1e-5,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Condition]:
    """Return unconditional embeddings with which guided sampling stays on the way, for every step, the noisiest first.

    Each step begins with the embedding of the one before, and takes up to `inner` steps of Adam at the rate
    10⁻² (1 - i / 2n), while the squared distance to the way is more than `tolerance` (1 + 2i).

    Args:
        way: see `inverted`.
        empty: the embedding that the first step begins with.
        advance: called after each step with the squared distance.
    """
    context = empty.context.detach().clone()
    latents, nulls = way[-1], []
    for i, step in enumerate(reversed(range(levels.steps))):
        with torch.no_grad():
            forward = _predicted(networks, levels, latents, step, told)
        context = context.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([context], lr=_RATE * (1 - i / (2 * levels.steps)))
        moved = partial(_guided, networks, levels, latents, forward, step, guidance)
        for _ in range(inner):
            with torch.enable_grad():
                loss = mse_loss(moved(context), way[step])
                (context.grad,) = torch.autograd.grad(loss, [context])
            optimizer.step()
            if float(loss.detach()) < tolerance * (1 + 2 * i):
                break
        nulls.append(Condition(context.detach().clone()))
        with torch.no_grad():
            latents = moved(context)
        advance(float(mse_loss(latents, way[step])))
    return nulls


def _guided(
    networks: Networks,
    levels: Ladder,
    latents: Tensor,
    forward: Tensor,
    step: int,
    guidance: float,
    context: Tensor,
) -> Tensor:
    """Return the latents after a step of guided sampling, where `context` stands for the empty prompt.

    Args:
        forward: what the network predicts with the prompt.
    """
    back = _predicted(networks, levels, latents, step, Condition(context))
    return levels.down(latents, back + guidance * (forward - back), step)


def _predicted(networks: Networks, levels: Ladder, latents: Tensor, step: int, told: Condition) -> Tensor:
    return networks.predict(latents, levels.when[step].to(latents.device).expand(len(latents)), told)
