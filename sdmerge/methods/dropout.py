"""Random dropout of the mean of several changes, with a say in how the models' kept elements overlap."""

from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, Place, method
from sdmerge.methods._parameters import DropSeed, Rescale
from sdmerge.methods._shared import wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@method(mixed=True, at_least=1)
def dropout(
    *tensors: "Tensor",
    base: "Tensor",
    place: Place,
    density: Annotated[float, Param("probability to keep an element", 0, 1, weight=True)] = 0.1,
    alpha: Annotated[float, Param("how much of the change is added to the base", weight=True)] = 0.5,
    overlap: Annotated[
        str, Param("how the models' kept elements overlap", choices=("independent", "disjoint", "shared"))
    ] = "independent",
    rescale: Rescale = True,
    seed: DropSeed = 0,
) -> "Tensor":
    """Drop elements of each model's change at random, and add the mean of what is kept of each element to the base.

    independent: each model keeps an element with probability ρ. shared: all keep it, or none. disjoint: with probability ρ
    one of them, by lot, keeps it. Rescaled, the last two have the mean change as expected value; independent models keep an
    element more often, with probability 1 − (1 − ρ)^n, and so add more. Density 0 gives the base. Exactly the base where all
    models equal it. (sd-mecha drops with probability 1 − ρ, and stops with an error at all but independent models.)

    Formula: base + α / ρ · Σ Mᵢ Δᵢ / max(1, Σ Mᵢ), Δᵢ = xᵢ − base, Mᵢ = 1 with probability ρ, else 0
    Source: sd-mecha (dropout); Yu et al. 2023, "Language models are super Mario"

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        place: which tensor, and which part of it.
        density: the ρ of the formula.
        alpha: 0 gives the base.
        overlap: see above.
        rescale: False: what is kept stays as it is.
        seed: another one drops other elements.
    """
    import torch

    origin = base.to(wide(base, *tensors))
    change = torch.zeros_like(origin)
    kept = torch.zeros_like(origin)
    masks = _masks(len(tensors), base, place, density, overlap, seed)
    for x, mask in zip(tensors, masks, strict=True):
        change += torch.where(mask, x.to(origin.dtype) - origin, 0.0)
        kept += mask
    change /= kept.clamp_(min=1)
    return change.mul_(alpha / density if rescale and density > 0 else alpha).add_(origin)


def _masks(
    models: int, like: "Tensor", place: Place, density: float, overlap: str, seed: int
) -> "Iterator[Tensor] | Sequence[Tensor]":
    if overlap == "independent":
        return (_uniform(like, place, seed, str(model)) < density for model in range(models))
    some = _uniform(like, place, seed, "kept") < density
    if overlap == "shared":
        return (some,) * models
    lot = _uniform(like, place, seed, "lot").mul_(models).floor_().clamp_(max=models - 1)
    return (some & (lot == model) for model in range(models))


def _uniform(like: "Tensor", place: Place, seed: int, purpose: str) -> "Tensor":
    key = sdkernels.philox.key(seed, f"{place.name}#{purpose}")
    return sdkernels.philox.uniform(like.numel(), key, place.start, device=like.device).reshape(like.shape)
