"""Methods that are linear in the models."""

from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.errors import RequestError
from sdmerge.method import Param, method

if TYPE_CHECKING:
    from torch import Tensor


@method(mixed=True, propagates=True)
def add_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("how much of what B learned over C is added to A")] = 1.0,
) -> "Tensor":
    """A + alpha (B - C): give A what B learned over C.

    The difference is taken first, so the result is exactly A where B equals C.

    Args:
        a, b, c: tensors of one shape.
        alpha: 1 adds all of it, 0 none; other values extrapolate.
    """
    return sdkernels.linear.combine(((1.0, a), (alpha, b, c)))


@method(mixed=True, propagates=True)
def weighted_sum(
    *tensors: "Tensor",
    weights: Annotated[tuple[float, ...], Param("one weight for each model, in order")],
) -> "Tensor":
    """Weighted sum of any number of models: w1 A + w2 B + ...

    Weights that add up to 1 are applied to differences from the heaviest model, x_k + Σ wᵢ (xᵢ − x_k): the same value,
    exact where the models agree, and a weight of 1 returns its model unchanged.

    Args:
        tensors: tensors of one shape.
        weights: as many numbers.
    """
    if len(weights) != len(tensors):
        raise RequestError(f"{len(weights)} weights for {len(tensors)} models (expected one for each)")
    if abs(sum(weights) - 1) > 1e-12:
        return sdkernels.linear.combine(tuple(zip(weights, tensors, strict=True)))
    heaviest = max(range(len(weights)), key=lambda i: weights[i])
    anchor = tensors[heaviest]
    rest = [(w, x, anchor) for i, (w, x) in enumerate(zip(weights, tensors, strict=True)) if i != heaviest]
    return sdkernels.linear.combine(((1.0, anchor), *rest))
