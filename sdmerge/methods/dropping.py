"""Methods that drop a part of each task vector Δ = x − base before adding them up: at random, or the largest and smallest.

Random ones draw from a counter-based generator, with a key for each tensor's name and model's position: the same mask in any
order, with any number of threads. All rescale what is kept by the inverse of its probability, as their papers do, so that
the expected sum stays; mergekit instead restores each tensor's sum of |Δ|.
"""

from typing import TYPE_CHECKING

import sdkernels
from sdmerge.errors import RequestError
from sdmerge.method import Place, method
from sdmerge.methods._parameters import (
    ByAgreeing,
    Chance,
    DropSeed,
    Kept,
    Lam,
    Largest,
    MeanChance,
    Rescale,
    Slope,
    SumByWeights,
    Vote,
    Weights,
)
from sdmerge.methods._shared import Numbers, blocks, for_each, total, wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@method(mixed=True, at_least=1)
def dare_linear(
    *tensors: "Tensor",
    base: "Tensor",
    place: Place,
    weights: Weights = (1.0,),
    density: Chance = (0.5,),
    lam: Lam = 1.0,
    normalize: SumByWeights = False,
    rescale: Rescale = True,
    seed: DropSeed = 0,
) -> "Tensor":
    """DARE: drop elements of each task vector at random, rescale the others, add up.

    Density 1 is task arithmetic, density 0 leaves the model out. Exactly the base where all models equal it.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ / ρᵢ, Mᵢ = 1 with probability ρᵢ, else 0
    Source: Yu et al. 2023, "Language models are super Mario"; mergekit (dare_linear)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        place: which tensor, and which part of it.
        weights: as many numbers.
        density: as many numbers, the ρᵢ.
        lam: 0 gives the base.
        normalize: divide by the weights' sum, which must not be 0.
        rescale: False: what is kept stays as it is.
        seed: another one drops other elements.

    Raises:
        RequestError: another number of weights or densities, or a sum of 0 to divide by.
    """
    deltas = _at_random(tensors, base, place, density, rescale, seed)
    return _added(base, deltas, _scaled(weights, tensors, lam, normalize))


@method(mixed=True, at_least=1)
def dare_ties(
    *tensors: "Tensor",
    base: "Tensor",
    place: Place,
    weights: Weights = (1.0,),
    density: Chance = (0.5,),
    lam: Lam = 1.0,
    normalize: ByAgreeing = False,
    rescale: Rescale = True,
    vote: Vote = "sum",
    seed: DropSeed = 0,
) -> "Tensor":
    """DARE with TIES: drop elements at random, rescale, elect a sign, add up the models that agree.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ / ρᵢ, over the models whose term has the elected sign
    Source: Yu et al. 2023; Yadav et al. 2023; mergekit (dare_ties)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        place: which tensor, and which part of it.
        weights: as many numbers.
        density: as many numbers, the ρᵢ.
        lam: 0 gives the base.
        normalize: divide by Σ wᵢ of those that agree.
        rescale: False: what is kept stays as it is.
        vote: sum: the sign of the sum; count: the sign that more models have.
        seed: another one drops other elements.

    Raises:
        RequestError: another number of weights or densities.
    """
    for_each("weights", weights, tensors)
    deltas = _at_random(tensors, base, place, density, rescale, seed)
    return _elected(base, deltas, weights, lam, normalize, vote)


@method(elementwise=False, mixed=True, at_least=1)
def della_linear(
    *tensors: "Tensor",
    base: "Tensor",
    place: Place,
    weights: Weights = (1.0,),
    density: MeanChance = (0.5,),
    epsilon: Slope = 0.15,
    lam: Lam = 1.0,
    normalize: SumByWeights = False,
    rescale: Rescale = True,
    seed: DropSeed = 0,
) -> "Tensor":
    """DELLA without election: drop at random, the smaller of each row more often; rescale; add up.

    A row is one output channel: all that one index of the first dimension holds; a vector is one row. (mergekit ranks a
    convolution along its second dimension.) Equal magnitudes rank in the order of their places. A row of one element is
    kept with probability ρ. Density 1 is task arithmetic, density 0 leaves the model out.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ / pᵢ, Mᵢ = 1 with probability pᵢ = ρᵢ − ε + 2 ε · rank of |Δᵢ| in its row, 0 to 1
    Source: Deep et al. 2024, "DELLA-merging"; mergekit (della_linear)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        place: which tensor.
        weights: as many numbers.
        density: as many numbers, the ρᵢ: 0, 1, or more than ε away from both.
        epsilon: 0 drops as DARE does.
        lam: 0 gives the base.
        normalize: divide by the weights' sum, which must not be 0.
        rescale: False: what is kept stays as it is.
        seed: another one drops other elements.

    Raises:
        RequestError: another number of weights or densities, a density too near to 0 or 1, or a sum of 0 to divide by.
    """
    import torch

    factors = _scaled(weights, tensors, lam, normalize)
    out = torch.empty(base.shape, dtype=wide(base, *tensors), device=base.device)
    for into, part, deltas in _by_rank(out, tensors, base, place, density, epsilon, rescale, seed):
        into.copy_(_added(part, deltas, factors))
    return out


@method(elementwise=False, mixed=True, at_least=1)
def della(
    *tensors: "Tensor",
    base: "Tensor",
    place: Place,
    weights: Weights = (1.0,),
    density: MeanChance = (0.5,),
    epsilon: Slope = 0.15,
    lam: Lam = 1.0,
    normalize: ByAgreeing = True,
    rescale: Rescale = True,
    vote: Vote = "sum",
    seed: DropSeed = 0,
) -> "Tensor":
    """DELLA: drop at random, the smaller of each row more often; rescale; elect a sign; average the models that agree.

    Rows, ranks and densities are as in della_linear.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ / pᵢ / Σ wᵢ, over the models whose term has the elected sign
    Source: Deep et al. 2024, "DELLA-merging"; mergekit (della)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        place: which tensor.
        weights: as many numbers.
        density: as many numbers, the ρᵢ: 0, 1, or more than ε away from both.
        epsilon: 0 drops as DARE does.
        lam: 0 gives the base.
        normalize: False: the plain weighted sum of those that agree.
        rescale: False: what is kept stays as it is.
        vote: sum: the sign of the sum; count: the sign that more models have.
        seed: another one drops other elements.

    Raises:
        RequestError: another number of weights or densities, or a density too near to 0 or 1.
    """
    import torch

    for_each("weights", weights, tensors)
    out = torch.empty(base.shape, dtype=wide(base, *tensors), device=base.device)
    for into, part, deltas in _by_rank(out, tensors, base, place, density, epsilon, rescale, seed):
        into.copy_(_elected(part, deltas, weights, lam, normalize, vote))
    return out


@method(elementwise=False, mixed=True, at_least=1)
def breadcrumbs(
    *tensors: "Tensor",
    base: "Tensor",
    weights: Weights = (1.0,),
    density: Kept = (0.9,),
    gamma: Largest = (0.01,),
    lam: Lam = 1.0,
    normalize: SumByWeights = False,
) -> "Tensor":
    """Model breadcrumbs: drop the largest changes of each model and so many of the smallest that its density remains.

    Of n elements ⌊γ n⌋ are dropped at the top, fewer where density · n would not remain; elements that tie with the
    largest or the smallest kept one stay. Density 1 keeps everything, γ or not, and density 0 nothing.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ, Mᵢ = 1 where |Δᵢ| lies between the two quantiles
    Source: Davari and Belilovsky 2023, "Model breadcrumbs"; mergekit (breadcrumbs)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        weights: as many numbers.
        density: as many numbers.
        gamma: as many numbers.
        lam: 0 gives the base.
        normalize: divide by the weights' sum, which must not be 0.

    Raises:
        RequestError: another number of weights, densities or gammas, or a sum of 0 to divide by.
    """
    import torch

    factors = _scaled(weights, tensors, lam, normalize)
    out = torch.empty(base.shape, dtype=wide(base, *tensors), device=base.device)
    for into, part, deltas in _between(out, tensors, base, density, gamma):
        into.copy_(_added(part, deltas, factors))
    return out


@method(elementwise=False, mixed=True, at_least=1)
def breadcrumbs_ties(
    *tensors: "Tensor",
    base: "Tensor",
    weights: Weights = (1.0,),
    density: Kept = (0.9,),
    gamma: Largest = (0.01,),
    lam: Lam = 1.0,
    normalize: ByAgreeing = False,
    vote: Vote = "sum",
) -> "Tensor":
    """Model breadcrumbs with TIES: drop the largest and smallest changes, elect a sign, add up the models that agree.

    What is dropped is as in breadcrumbs.

    Formula: base + λ Σ wᵢ Mᵢ Δᵢ, over the models whose term has the elected sign
    Source: Davari and Belilovsky 2023; Yadav et al. 2023; mergekit (breadcrumbs_ties)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        weights: as many numbers.
        density: as many numbers.
        gamma: as many numbers.
        lam: 0 gives the base.
        normalize: divide by Σ wᵢ of those that agree.
        vote: sum: the sign of the sum; count: the sign that more models have.

    Raises:
        RequestError: another number of weights, densities or gammas.
    """
    import torch

    for_each("weights", weights, tensors)
    out = torch.empty(base.shape, dtype=wide(base, *tensors), device=base.device)
    for into, part, deltas in _between(out, tensors, base, density, gamma):
        into.copy_(_elected(part, deltas, weights, lam, normalize, vote))
    return out


def _at_random(
    tensors: "Sequence[Tensor]", base: "Tensor", place: Place, density: Numbers, rescale: bool, seed: int
) -> "list[Tensor]":
    for_each("density", density, tensors)
    return [
        sdkernels.dropout.drop(x, share, _key(seed, place, i), place.start, base=base, rescale=rescale)
        for i, (x, share) in enumerate(zip(tensors, density, strict=True))
    ]


def _by_rank(
    out: "Tensor", tensors: "Sequence[Tensor]", base: "Tensor", place: Place, density: Numbers, epsilon: float,
    rescale: bool, seed: int,
) -> "Iterator[tuple[Tensor, Tensor, list[Tensor]]]":  # fmt: skip
    """Walk through the rows: a part of `out` and of the base, and each model's thinned difference there."""
    for_each("density", density, tensors)
    for share in density:
        if 0 < share < 1 and not epsilon < share < 1 - epsilon:
            raise RequestError(
                f"density is {share:g} (expected 0, 1, or more than epsilon, {epsilon:g}, away from both)"
            )
    if not base.numel():
        return
    rows = base.shape[0] if base.ndim > 1 else 1
    start = place.start
    for into, part, *models in blocks(out, base, *tensors, rows=rows):
        deltas = []
        for i, (x, share) in enumerate(zip(models, density, strict=True)):
            keep = _chances(x, part, share, epsilon) if 0 < share < 1 else share
            deltas.append(sdkernels.dropout.drop(x, keep, _key(seed, place, i), start, base=part, rescale=rescale))
        yield into, part, deltas
        start += part.numel()


def _chances(x: "Tensor", base: "Tensor", density: float, epsilon: float) -> "Tensor":
    """Return each element's probability to stay: density − ε for the smallest |x − base| of its row, up to density + ε."""
    import torch

    dtype = wide(x, base)
    width = x.shape[1]
    if width == 1:
        return torch.full(x.shape, density, device=x.device)
    order = (x.to(dtype) - base.to(dtype)).abs_().argsort(dim=1, stable=True)
    ladder = torch.linspace(density - epsilon, density + epsilon, width, dtype=torch.float64, device=x.device).float()
    return torch.empty(x.shape, device=x.device).scatter_(1, order, ladder.expand(x.shape))


def _between(
    out: "Tensor", tensors: "Sequence[Tensor]", base: "Tensor", density: Numbers, gamma: Numbers
) -> "Iterator[tuple[Tensor, Tensor, list[Tensor]]]":
    """Walk through blocks: a part of `out` and of the base, and each model's difference without its extremes there."""
    for_each("density", density, tensors)
    for_each("gamma", gamma, tensors)
    limits = [_limits(x, base, *shares) for x, *shares in zip(tensors, density, gamma, strict=True)]
    for into, part, *models in blocks(out, base, *tensors):
        origin = part.to(out.dtype)
        deltas = [x.to(out.dtype) - origin for x in models]
        for delta, (low, high) in zip(deltas, limits, strict=True):
            size = delta.abs()
            delta.masked_fill_((size < low) | (size > high), 0)
        yield into, origin, deltas


def _limits(x: "Tensor", base: "Tensor", density: float, gamma: float) -> tuple[float, float]:
    """Return the smallest and the largest |x − base| that is kept."""
    count = x.numel()
    kept = int(density * count)
    if density >= 1 or not count:
        return 0.0, float("inf")
    if not kept:
        return float("inf"), 0.0
    skipped = min(int(gamma * count), count - kept)
    return (
        sdkernels.select.kth_magnitude(x, skipped + kept, base).item(),
        sdkernels.select.kth_magnitude(x, skipped + 1, base).item(),
    )


def _added(base: "Tensor", deltas: "Sequence[Tensor]", factors: Numbers) -> "Tensor":
    return sdkernels.linear.combine(((1.0, base), *zip(factors, deltas, strict=True)))


def _elected(
    base: "Tensor", deltas: "Sequence[Tensor]", weights: Numbers, lam: float, normalize: bool, vote: str
) -> "Tensor":
    """Add up the differences that have the elected sign. What was dropped is 0, which has no sign and no vote."""
    origin = base.new_zeros(base.shape)
    thresholds = [0.0] * len(deltas)
    change: Tensor = sdkernels.ties.merge(
        origin, deltas, weights, thresholds, scale=lam, normalize=normalize, vote=vote
    )
    return change.add_(base.to(change.dtype))


def _scaled(weights: Numbers, tensors: "Sequence[Tensor]", lam: float, normalize: bool) -> Numbers:
    for_each("weights", weights, tensors)
    if not normalize:
        return tuple(lam * weight for weight in weights)
    divisor = total(weights)
    return tuple(lam * weight / divisor for weight in weights)


def _key(seed: int, place: Place, model: int) -> tuple[int, int]:
    return sdkernels.philox.key(seed, f"{place.name}#{model}")
