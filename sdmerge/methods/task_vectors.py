"""Methods that add up what models learned over a common base: their task vectors Δ = x − base."""

import math
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, method, summed
from sdmerge.methods._parameters import ByAgreeing, Kept, Lam, Negligible, SumByWeights, Vote, Weights
from sdmerge.methods._shared import blocks, for_each, total, wide

if TYPE_CHECKING:
    from torch import Tensor

    from sdmerge.methods._shared import Terms


@method(mixed=True, propagates=True, at_least=1)
@summed
def task_arithmetic(
    *tensors: "Tensor",
    base: "Tensor",
    weights: Weights = (1.0,),
    lam: Lam = 1.0,
    normalize: SumByWeights = False,
) -> "Terms":
    """Task arithmetic: the base plus the weighted sum of what the models learned over it.

    Exactly the base where all models equal it.

    Formula: base + λ Σ wᵢ (xᵢ − base), divided by Σ wᵢ where normalized
    Source: Ilharco et al. 2022, "Editing models with task arithmetic"; mergekit (task_arithmetic)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        weights: as many numbers; negative ones unlearn.
        lam: 0 gives the base.
        normalize: divide by the weights' sum, which must not be 0.

    Raises:
        RequestError: another number of weights, or a sum of 0 to divide by.
    """
    for_each("weights", weights, tensors)
    factor = lam / total(weights) if normalize else lam
    return (1.0, base), *((factor * weight, x, base) for weight, x in zip(weights, tensors, strict=True))


def _thresholds(*tensors: "Tensor", base: "Tensor", density: tuple[float, ...], **_: object) -> "list[Tensor | float]":
    """Return the smallest change of each model that TIES keeps."""
    for_each("density", density, tensors)
    return [_smallest_kept(x, base, share) for x, share in zip(tensors, density, strict=True)]


@method(measure=_thresholds, mixed=True, at_least=1)
def ties(
    *tensors: "Tensor",
    base: "Tensor",
    weights: Weights = (1.0,),
    density: Kept = (0.2,),
    lam: Lam = 1.0,
    normalize: ByAgreeing = True,
    vote: Vote = "sum",
    measured: "list[Tensor | float] | None" = None,
) -> "Tensor":
    """TIES: trim what each model learned to its largest changes, elect a sign, average the models that agree.

    Of n elements k = max(1, ⌊density · n⌋) are kept: all whose |Δ| is at least the k-th largest, so where several tie
    there (usual with fp16 models) all of them stay. mergekit and others keep exactly k, and which of the tied ones is left
    to the sort. Density 0 keeps nothing, 1 everything. An election that is even goes to +, as in mergekit. An element that
    no model changed is the base's.

    Formula: base + λ Σ wᵢ Δᵢ / Σ wᵢ, over the models whose trimmed wᵢ Δᵢ has the elected sign
    Source: Yadav et al. 2023, "TIES-merging: resolving interference when merging models"; mergekit (ties)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        weights: as many numbers.
        density: as many numbers.
        lam: 0 gives the base.
        normalize: False: the plain weighted sum of those that agree.
        vote: sum: the sign of Σ wᵢ Δᵢ; count: the sign that more models have.
        measured: the smallest |Δ| of each model that is kept, where the tensors are blocks of larger ones.

    Raises:
        RequestError: another number of weights or densities.
    """
    for_each("weights", weights, tensors)
    thresholds = measured if measured is not None else _thresholds(*tensors, base=base, density=density)
    return sdkernels.ties.merge(base, tensors, weights, thresholds, scale=lam, normalize=normalize, vote=vote)


@method(mixed=True, at_least=1)
def ram(
    *tensors: "Tensor",
    base: "Tensor",
    epsilon: Negligible = 1e-5,
) -> "Tensor":
    """Reinforced agent merging: average each element over the models that changed it; a lone change is kept whole.

    Exactly the base where no model changed it by more than ε.

    Formula: base + Σ Δᵢ / n, over the n models with |Δᵢ| > ε
    Source: arXiv 2601.13572 (RAM); mergekit (ram)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        epsilon: in the units of the weights.
    """
    return _reinforced(tensors, base, (1.0,) * len(tensors), epsilon)


@method(elementwise=False, mixed=True, at_least=1)
def ram_plus(
    *tensors: "Tensor",
    base: "Tensor",
    r: Annotated[float, Param("how strongly lone changes are raised", weight=True)] = 0.1,
    alpha: Annotated[float, Param("largest ratio of shared to lone changes that counts", 0, weight=True)] = 0.2,
    epsilon: Negligible = 1e-5,
) -> "Tensor":
    """RAM+: RAM, with the lone changes of a model raised the more, the more of its other changes are averaged away.

    A model without lone changes has the ratio ∞ where it shares any, and 0 where it changed nothing.

    Formula: base + Σ Δᵢ / n where n > 1 models have |Δᵢ| > ε; base + (1 + r · min(sharedᵢ / loneᵢ, α)) Δᵢ where one has
    Source: arXiv 2601.13572 (RAM+); mergekit (ramplus_tl, counted in each tensor by itself as here)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        r: 0 gives RAM.
        alpha: 0 gives RAM too.
        epsilon: in the units of the weights.
    """
    import torch

    lone, changed = ([0] * len(tensors) for _ in range(2))
    dtype = wide(base, *tensors)
    for parts in blocks(base, *tensors):
        first, *rest = (part.to(dtype) for part in parts)
        far = torch.stack([(x - first).abs_() > epsilon for x in rest])
        alone = far.sum(0) == 1
        for i, mask in enumerate(far):
            changed[i] += int(mask.sum())
            lone[i] += int((mask & alone).sum())
    ratios = [
        (all_ - own) / own if own else (math.inf if all_ else 0.0) for all_, own in zip(changed, lone, strict=True)
    ]
    return _reinforced(tensors, base, tuple(1 + r * min(ratio, alpha) for ratio in ratios), epsilon)


def _reinforced(tensors: "tuple[Tensor, ...]", base: "Tensor", alone: tuple[float, ...], epsilon: float) -> "Tensor":
    """Add the mean of the changes to the base; a change that only one model has, times that model's factor `alone`."""
    import torch

    out = torch.empty(base.shape, dtype=wide(base, *tensors), device=base.device)
    for into, *parts in blocks(out, base, *tensors):
        first, *rest = (part.to(out.dtype) for part in parts)
        count = torch.zeros_like(first)
        mean = torch.zeros_like(first)
        raised = torch.zeros_like(first)
        for x, factor in zip(rest, alone, strict=True):
            delta = x - first
            delta.masked_fill_(delta.abs() <= epsilon, 0)
            count += delta != 0
            mean += delta
            raised.add_(delta, alpha=factor)
        into.copy_(first + torch.where(count > 1, mean / count.clamp(min=1), raised))
    return out


def _smallest_kept(x: "Tensor", base: "Tensor", density: float) -> "Tensor | float":
    """Return the smallest |x − base| that belongs to the largest `density` of all."""
    if density <= 0:
        return math.inf
    if density >= 1 or not x.numel():
        return 0.0
    return sdkernels.select.kth_magnitude(x, max(1, int(density * x.numel())), base)
