"""Methods that see tensors as points or vectors: what is perpendicular, where the median lies, which range is spanned."""

import functools
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.errors import RequestError
from sdmerge.method import Param, method
from sdmerge.methods._parameters import Iterations, NonNegativeWeights
from sdmerge.methods._shared import for_each, from_heaviest, norm, wide

if TYPE_CHECKING:
    from torch import Tensor

_SAME = 1e-9
"""Relative: below this, a point's own weight and the pull of the others on it count as equal."""


@method(elementwise=False, mixed=True, propagates=True)
def perpendicular(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("how much of what only B learned is added to A", weight=True)] = 1.0,
) -> "Tensor":
    """A + alpha times the part of B - C that is perpendicular to A - C: what B learned and A did not.

    Exactly A where B equals C; A, to rounding, where both learned the same, or the opposite. Where A equals C nothing is
    parallel to its change, and all of B − C is added (sd-mecha: nothing).

    Formula: A + α (Δb − Δa · ⟨Δa, Δb⟩ / ⟨Δa, Δa⟩), Δa = A − C, Δb = B − C
    Source: sd-mecha (add_perpendicular)

    Args:
        a, b: tensors of one shape.
        c: of the same shape; the model that both were made from.
        alpha: 0 gives A.
    """
    gram = sdkernels.reduce.gram((a, b), center=c)
    own, common = gram[0, 0].item(), gram[0, 1].item()
    terms: list[tuple[float, Tensor] | tuple[float, Tensor, Tensor]] = [(1.0, a), (alpha, b, c)]
    if own != 0:
        terms.append((-alpha * common / own, a, c))
    return sdkernels.linear.combine(terms)


@method(elementwise=False, mixed=True)
def geometric_median(
    *tensors: "Tensor",
    weights: NonNegativeWeights = (1.0,),
    iterations: Iterations = 100,
    tolerance: Annotated[float, Param("stop when a step is shorter than this share of the mean distance", 0)] = 1e-10,
) -> "Tensor":
    """Geometric median: the point whose distances to the models add up to least; one odd model hardly moves it.

    A model that is itself the median, as one that most models equal, is returned unchanged. Where the median is not unique
    (two models of one weight, or an even number on one line), it is the one that is found from the mean: of two models of
    one weight, their mean. (sd-mecha has no weights, takes distances below 1e-6 as 1e-6, and in float32 stops where the sum
    is flat, some 5e-5 of the distances away.)

    Formula: argmin over x of Σ wᵢ ‖x − xᵢ‖, by x ← Σ (wᵢ / dᵢ) xᵢ / Σ (wᵢ / dᵢ), dᵢ = ‖x − xᵢ‖, from the mean
    Source: Weiszfeld 1937; Vardi, Zhang 2000, "The multivariate L1-median"; sd-mecha (geometric_median)

    Args:
        tensors: tensors of one shape.
        weights: as many numbers.
        iterations: 0 gives the mean, or the model that is the median.
        tolerance: 0 makes all steps.

    Raises:
        RequestError: another number of weights, or a sum of 0.
    """
    import torch

    for_each("weights", weights, tensors)
    if sum(weights) <= 0:
        raise RequestError("weights add up to 0: no model has a say (expected at least one above 0)")
    gram = sdkernels.reduce.gram(tensors, center=tensors[0]).cpu()
    shares = _weiszfeld(gram, torch.tensor(weights, dtype=torch.float64), iterations, tolerance).tolist()
    return sdkernels.linear.combine(from_heaviest(shares, tensors))


def _weiszfeld(gram: "Tensor", weights: "Tensor", iterations: int, tolerance: float) -> "Tensor":
    """Return the share of each point in the median.

    Every iterate is a combination of the points, so their dot products (to a common origin) are all that is needed.
    """
    import torch

    for corner in torch.eye(len(weights), dtype=torch.float64).unbind():
        distance, pull, own = _pull(gram, weights, corner)
        if own > 0 and pull < own * (1 - _SAME):
            return corner
    shares = weights / weights.sum()
    for _ in range(iterations):
        distance, pull, own = _pull(gram, weights, shares)
        closeness = torch.where(distance > 0, weights / distance.where(distance > 0, 1.0), 0.0)
        if closeness.sum() == 0:
            break
        step = closeness / closeness.sum() - shares
        if own > 0:  # on a point that is not the median: its weight holds back, and does not stop, the step
            step *= max(0.0, 1 - own / pull) if pull > 0 else 0.0
        shares = shares + step
        if norm(step, gram) <= tolerance * float(weights @ distance / weights.sum()):
            break
    return shares


def _pull(gram: "Tensor", weights: "Tensor", shares: "Tensor") -> "tuple[Tensor, float, float]":
    """Return the points' distances to Σ shares · point, the pull of those apart from it, the weight of the rest."""
    import torch

    toward = gram @ shares
    distance = (gram.diagonal() - 2 * toward + shares @ toward).clamp(min=0).sqrt()
    # What rounding leaves of the squares is no distance.
    distance = torch.where(distance <= 1e-7 * gram.diagonal().max().sqrt(), 0.0, distance)
    apart = distance > 0
    force = torch.where(apart, weights / distance.where(apart, 1.0), 0.0)
    return distance, norm(force - force.sum() * shares, gram), float(weights[~apart].sum())


@method(mixed=True, at_least=3)
def clamp(
    *tensors: "Tensor",
    stiffness: Annotated[float, Param("0 the models' whole range, 1 the narrowest", 0, 1, weight=True)] = 0.0,
) -> "Tensor":
    """Clamp the first model's values to the range that the others span.

    Where the others are equal, the result is theirs. The narrowest range goes from the largest value that is at most their
    mean to the smallest that is at least their mean: with two of them it is the whole range, with more a tighter one.

    Formula: min(max(A, l), u); u = (1 − s) max(Bᵢ) + s min(Bᵢ ≥ mean(B)), l = (1 − s) min(Bᵢ) + s max(Bᵢ ≤ mean(B))
    Source: sd-mecha (clamp)

    Args:
        tensors: the model, then two or more that bound it; all of one shape.
        stiffness: the s of the formula.
    """
    import torch

    dtype = wide(*tensors)
    first, *bounds = (x.to(dtype) for x in tensors)
    high, low = functools.reduce(torch.maximum, bounds), functools.reduce(torch.minimum, bounds)
    if stiffness > 0:
        total = functools.reduce(torch.add, (bound.double() for bound in bounds))
        above, below = high, low
        for bound in bounds:
            scaled = bound.double() * len(bounds)  # dividing would round, and miss a bound that is the mean
            above = torch.where(scaled >= total, torch.minimum(above, bound), above)
            below = torch.where(scaled <= total, torch.maximum(below, bound), below)
        high, low = high.lerp(above, stiffness), low.lerp(below, stiffness)
    return torch.minimum(torch.maximum(first, low), high)
