"""Methods that are linear in the models."""

from typing import TYPE_CHECKING

from sdmerge.method import method, summed
from sdmerge.methods._parameters import ByWeights, Learned, ShareOfB, Weights
from sdmerge.methods._shared import for_each, from_heaviest, normalized

if TYPE_CHECKING:
    from torch import Tensor

    from sdmerge.methods._shared import Terms


@method(mixed=True, propagates=True)
@summed
def add_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
) -> "Terms":
    """A + alpha (B - C): give A what B learned over C.

    The difference is taken first, so the result is exactly A where B equals C.

    Formula: A + α (B − C)
    Source: AUTOMATIC1111's checkpoint merger ("Add difference"); everyone since

    Args:
        a, b, c: tensors of one shape.
        alpha: 1 adds all of it, 0 none; other values extrapolate.
    """
    return (1.0, a), (alpha, b, c)


@method(mixed=True, propagates=True)
@summed
def weighted_sum(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: ShareOfB = 0.5,
) -> "Terms":
    """Weighted sum of two models.

    Taken as a step from the model with the larger share: exact where the models agree, and a share of 1 returns its model.

    Formula: (1 − α) A + α B
    Source: AUTOMATIC1111's checkpoint merger ("Weighted sum"); everyone since

    Args:
        a, b: tensors of one shape.
        alpha: 0 gives A, 1 gives B; other values extrapolate.
    """
    if alpha > 0.5:
        return (1.0, b), (1.0 - alpha, a, b)
    return (1.0, a), (alpha, b, a)


@method(mixed=True, propagates=True, at_least=1)
@summed
def linear(
    *tensors: "Tensor",
    weights: Weights = (1.0,),
    normalize: ByWeights = True,
) -> "Terms":
    """Weighted sum, or average, of any number of models.

    Weights that add up to 1 are applied to differences from the heaviest model, x_k + Σ wᵢ (xᵢ − x_k): the same value,
    exact where the models agree, and a weight of 1 returns its model unchanged.

    Formula: Σ wᵢ xᵢ, divided by Σ wᵢ where normalized
    Source: mergekit (linear), sd-mecha (n_average), kohya's merge scripts

    Args:
        tensors: tensors of one shape.
        weights: as many numbers.
        normalize: divide by the weights' sum, which must not be 0.

    Raises:
        RequestError: another number of weights, or a sum of 0 to divide by.
    """
    for_each("weights", weights, tensors)
    if normalize:
        weights = normalized(weights)
    elif abs(sum(weights) - 1) > 1e-12:
        return tuple(zip(weights, tensors, strict=True))
    return from_heaviest(weights, tensors)
