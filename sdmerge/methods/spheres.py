"""Methods that turn one model into another along a sphere, instead of cutting through it.

All of them return a linear combination of the models whose coefficients depend only on lengths and angles. Those are read
off one float64 matrix of dot products, so that tensors are widened block by block, never as a whole.
"""

import math
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, method
from sdmerge.methods._parameters import ByWeights, Iterations, NonNegativeWeights, Weights
from sdmerge.methods._shared import for_each, norm, normalized, rows_at_once, steps, wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdkernels.linear import Term

_PARALLEL = 1e-12
"""Below this sin², arc and chord differ by less than float32 can tell, and opposite vectors have no arc at all."""


@method(elementwise=False, mixed=True)
def slerp(
    a: "Tensor",
    b: "Tensor",
    *,
    t: Annotated[float, Param("how far to go from A to B", weight=True)] = 0.5,
) -> "Tensor":
    """Spherical interpolation from A to B, each tensor as one vector.

    The straight line is taken where there is no arc to speak of: |cos θ| above 0.9995 (nearly parallel, or opposite), or
    where A or B is zero. mergekit treats a zero vector as one at a right angle, which scales the other by more than its
    share. Equal tensors are returned unchanged.

    Formula: (sin((1 − t) θ) A + sin(t θ) B) / sin θ, θ the angle between A and B
    Source: Shoemake 1985, "Animating rotation with quaternion curves"; mergekit (slerp)

    Args:
        a, b: tensors of one shape.
        t: 0 gives A, 1 gives B; other values go on along the arc.
    """
    gram = sdkernels.reduce.gram((a, b)).reshape(1, 2, 2)
    first, second = _arc(gram, t, 1 - 0.9995**2)
    return _combined((first.item(), second.item()), (a, b))


@method(elementwise=False, mixed=True)
def nuslerp(
    a: "Tensor",
    b: "Tensor",
    *,
    base: "Tensor | None" = None,
    weights: Weights = (1.0,),
    flatten: Annotated[bool, Param("take each tensor as one vector")] = True,
    row_wise: Annotated[bool, Param("where not flattened: vectors along the first dimension, not the last")] = False,
) -> "Tensor":
    """Spherical interpolation of two models by weights, of their differences from a base where one is given.

    The straight line is taken where vectors are parallel or opposite (1 − cos² below 1e-12) or one is zero (mergekit: at a
    right angle to everything). Equal tensors are returned unchanged. Weights that add up to 0 count as equal.

    Formula: base + (sin((1 − t) θ) Δa + sin(t θ) Δb) / sin θ, t = w_b / (w_a + w_b), Δ = x − base
    Source: mergekit (nuslerp); Shoemake 1985

    Args:
        a, b: tensors of one shape.
        base: of the same shape; zero where left out.
        weights: two numbers; only their ratio counts.
        flatten: False: each vector along one dimension is turned by itself.
        row_wise: which dimension; mergekit's nuslerp_row_wise.
    """
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if flatten or a.ndim < 2:
        gram = sdkernels.reduce.gram((a, b), center=base).reshape(1, 2, 2)
        first, second = _arc(gram, t, _PARALLEL)
        return _combined((first.item(), second.item()), (a, b), base)
    return _by_vectors(a, b, base, t, row_wise)


@method(elementwise=False, mixed=True, at_least=1)
def multislerp(
    *tensors: "Tensor",
    base: "Tensor | None" = None,
    weights: Weights = (1.0,),
    normalize: ByWeights = True,
    epsilon: Annotated[float, Param("directions that cancel to less than this length count as cancelled", 0)] = 1e-8,
) -> "Tensor":
    """Weighted mean of directions times the weighted mean of lengths, of differences from a base where one is given.

    mergekit's further step, the weighted mean in the tangent space at that direction, is zero by construction and left
    out. Where the directions cancel, or all vectors are zero, the plain weighted sum is returned for any number of models
    (mergekit: for two; it stops with an error for more). Equal tensors are returned unchanged.

    Formula: base + Σ wᵢ‖Δᵢ‖ · u / ‖u‖, u = Σ wᵢ Δᵢ / ‖Δᵢ‖, Δ = x − base
    Source: mergekit (multislerp); Goddard, "Multi-SLERP"

    Args:
        tensors: tensors of one shape.
        base: of the same shape; zero where left out.
        weights: as many numbers.
        normalize: divide by the weights' sum, which must not be 0.
        epsilon: a length; unit vectors are summed, so it needs no scale.

    Raises:
        RequestError: another number of weights, or a sum of 0 to divide by.
    """
    import torch

    for_each("weights", weights, tensors)
    share = torch.tensor(normalized(weights) if normalize else weights, dtype=torch.float64)
    gram = sdkernels.reduce.gram(tensors, center=base).cpu()
    norms = gram.diagonal().clamp(min=0).sqrt()
    scaled = torch.where(norms > 0, share / norms.where(norms > 0, 1.0), 0.0)
    length = norm(scaled, gram)
    if not math.isfinite(length) or length <= epsilon:
        return _combined(share.tolist(), tensors, base)
    return _combined((scaled * (float(share @ norms) / length)).tolist(), tensors, base)


@method(elementwise=False, mixed=True, at_least=1)
def karcher(
    *tensors: "Tensor",
    weights: NonNegativeWeights = (1.0,),
    iterations: Iterations = 10,
    tolerance: Annotated[float, Param("stop when a step is shorter than this angle", 0)] = 1e-5,
) -> "Tensor":
    """Karcher mean: the direction whose squared angles to the models add up to least, times the mean length.

    Zero tensors have no direction and count for the length only. A model opposite to the mean, which no single shortest
    way leads to, is passed over in that step (mergekit: divides by sin π). Directions that cancel start at the first
    model. Equal tensors are returned unchanged.

    Formula: Σ wᵢ‖xᵢ‖ · m, m ← cos τ · m + sin τ · v / τ, v = Σ wᵢ θᵢ / sin θᵢ (xᵢ/‖xᵢ‖ − cos θᵢ · m), τ = ‖v‖
    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; mergekit (karcher)

    Args:
        tensors: tensors of one shape.
        weights: as many numbers; only their ratios count (mergekit: equal).
        iterations: 10 are plenty for models of one family.
        tolerance: radians.

    Raises:
        RequestError: another number of weights, or a sum of 0 to divide by.
    """
    import torch

    for_each("weights", weights, tensors)
    share = torch.tensor(normalized(weights), dtype=torch.float64)
    gram = sdkernels.reduce.gram(tensors).cpu()
    norms = gram.diagonal().clamp(min=0).sqrt()
    usable = (norms > 0) & norms.isfinite() & (share > 0)
    if not usable.any():
        return _combined(share.tolist(), tensors)
    safe = norms.where(usable, 1.0)
    angles = torch.where(usable[:, None] & usable, gram / safe / safe[:, None], 0.0)
    pull = share.where(usable, 0.0)
    mean = _mean_direction(angles, pull / pull.sum(), iterations, tolerance)
    length = float((share * norms.where(norms.isfinite(), 0.0)).sum())
    return _combined((mean / safe * length).tolist(), tensors)


def _mean_direction(cosines: "Tensor", share: "Tensor", iterations: int, tolerance: float) -> "Tensor":
    """Return the Karcher mean of unit vectors as coefficients of them, given the cosines between them (float64)."""
    import torch

    mean = share
    length = norm(mean, cosines)
    if length < max(tolerance, 1e-12):
        mean, length = torch.zeros_like(share), 1.0
        mean[int(share.nonzero()[0])] = 1.0
    mean = mean / length
    for _ in range(iterations):
        cos = (cosines @ mean).clamp(-1, 1)
        theta = cos.acos()
        sin = theta.sin()
        moving = (theta >= tolerance) & (sin > 1e-9)
        pull = torch.where(moving, share * theta / sin.where(moving, 1.0), 0.0)
        step = pull - (pull @ cos) * mean
        size = norm(step, cosines)
        if size < max(tolerance, 1e-12):
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / norm(mean, cosines)
    return mean


def _arc(gram: "Tensor", t: float, least: float) -> "tuple[Tensor, Tensor]":
    """Return what to multiply two vectors with, for each matrix of dot products in ``gram[rows, 2, 2]`` (float64).

    Where sin² of their angle is below `least`, or a vector is zero or too large to square: 1 − t and t.
    """
    import torch

    cos = gram[:, 0, 1] / gram[:, 0, 0].sqrt() / gram[:, 1, 1].sqrt()
    round_way = (1 - cos.square() >= least) & cos.isfinite()
    theta = torch.where(round_way, cos, 0.0).acos()
    first = torch.where(round_way, ((1 - t) * theta).sin() / theta.sin(), 1 - t)
    second = torch.where(round_way, (t * theta).sin() / theta.sin(), t)
    return first, second


def _combined(coefficients: "Sequence[float]", tensors: "Sequence[Tensor]", base: "Tensor | None" = None) -> "Tensor":
    """Return base + Σ c (x − base), in the accumulator's type.

    Written as steps from the model that counts most, so that equal models are returned unchanged where Σ c is 1.
    """
    import torch

    heaviest = max(range(len(tensors)), key=lambda i: abs(coefficients[i]))
    anchor = tensors[heaviest]
    terms: list[Term] = [(1.0, anchor)]
    excess = math.fsum(coefficients) - 1
    if abs(excess) > 1e-12:
        terms.append((excess, anchor) if base is None else (excess, anchor, base))
    out = torch.empty(anchor.shape, dtype=wide(*tensors, base), device=anchor.device)
    return sdkernels.linear.combine((*terms, *steps(coefficients, tensors, heaviest)), out=out)


def _by_vectors(a: "Tensor", b: "Tensor", base: "Tensor | None", t: float, first_dimension: bool) -> "Tensor":
    """Interpolate each vector along the first, or the last, dimension by itself."""
    import torch

    inputs = (a, b) if base is None else (a, b, base)
    dtype = wide(*inputs)
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    if not out.numel():
        return out
    width = a.shape[0] if first_dimension else a.shape[-1]
    views = [x.reshape(width, -1).T if first_dimension else x.reshape(-1, width) for x in (out, *inputs)]
    for into, *stored in zip(*(torch.split(view, rows_at_once(width)) for view in views), strict=True):
        first, second, *origin = (x.to(dtype).contiguous() for x in stored)
        gram = sdkernels.reduce.gram((first, second), center=origin[0] if origin else None, rows=True)
        of_first, of_second = (c.to(dtype).unsqueeze(1) for c in _arc(gram, t, _PARALLEL))
        near, far, share = (first, second, of_second) if t <= 0.5 else (second, first, of_first)
        excess = of_first + of_second - 1
        excess = torch.where(excess.abs() > 4 * torch.finfo(dtype).eps, excess, 0.0)
        into.copy_(near + excess * (near - origin[0] if origin else near) + share * (far - near))
    return out
