"""What several merge methods need: checks of their numbers, steps from the heaviest model, blocks, lengths."""

import math
from typing import TYPE_CHECKING

import sdkernels
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, dtype

    from sdkernels.linear import Term

    Terms = tuple[Term, ...]
    """What a sum is made of: see `sdkernels.linear`."""

Numbers = tuple[float, ...]
"""One number for each model."""

BLOCK = 1 << 18
"""Elements widened at a time."""


def for_each(name: str, numbers: Numbers, tensors: "Sequence[Tensor]") -> None:
    """Refuse another number of numbers than models.

    Raises:
        RequestError: so it is.
    """
    if len(numbers) != len(tensors):
        raise RequestError(f"{len(numbers)} {name} for {len(tensors)} models (expected one for each)")


def total(weights: Numbers) -> float:
    """Return the sum of weights, to divide by.

    Raises:
        RequestError: it is 0.
    """
    if (added := sum(weights)) == 0:
        raise RequestError("weights add up to 0 and cannot be normalized")
    return added


def normalized(weights: Numbers) -> Numbers:
    """Return the weights divided by their sum.

    Raises:
        RequestError: it is 0.
    """
    divisor = total(weights)
    return tuple(weight / divisor for weight in weights)


def from_heaviest(shares: "Sequence[float]", tensors: "Sequence[Tensor]") -> "Terms":
    """Return the terms of Σ share · x, shares that add up to 1, as steps from the model with the largest: equal models stay."""
    heaviest = max(range(len(shares)), key=lambda i: shares[i])
    return (1.0, tensors[heaviest]), *steps(shares, tensors, heaviest)


def steps(shares: "Sequence[float]", tensors: "Sequence[Tensor]", anchor: int) -> "list[Term]":
    """Return the terms share · (x − anchor) of all models but the anchor."""
    origin = tensors[anchor]
    return [(share, x, origin) for i, (share, x) in enumerate(zip(shares, tensors, strict=True)) if i != anchor]


def norm(coefficients: "Tensor", gram: "Tensor") -> float:
    """Return the length of the combination of vectors that have these dot products; NaN stays."""
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))


def nonzero(x: "Tensor") -> "Tensor":
    """Return x with 1 for every 0, to divide by."""
    return x.masked_fill(x == 0, 1)


def wide(*tensors: "Tensor | None") -> "dtype":
    """Return the type to compute in; None counts as no tensor."""
    return sdkernels.cast.accumulator(*(x.dtype for x in tensors if x is not None))


def blocks(*tensors: "Tensor", rows: int | None = None) -> "zip[tuple[Tensor, ...]]":
    """Walk through all tensors at once, a block of each at a time: flattened, or some of so many rows."""
    import torch

    views = [x.reshape(-1) if rows is None else x.reshape(rows, -1) for x in tensors]
    size = rows_at_once(1 if rows is None else views[0].shape[1])
    return zip(*(torch.split(view, size) for view in views), strict=True)


def rows_at_once(width: int) -> int:
    """Return how many rows of a width make a block; at least one."""
    return max(1, BLOCK // max(1, width))
