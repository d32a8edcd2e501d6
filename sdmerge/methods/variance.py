"""Methods that let the models' spread around a base, or around each other, say how much of each is taken."""

import math
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, method
from sdmerge.methods._shared import blocks, wide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@method(elementwise=False, mixed=True)
def model_stock(
    *tensors: "Tensor",
    base: "Tensor",
    filter_wise: Annotated[bool, Param("one ratio for each index of the first dimension, not for the tensor")] = False,
) -> "Tensor":
    """Model stock: from the base towards the models' mean, as far as the angles between their task vectors suggest.

    cos θ is the mean over all pairs. A difference of zero is at a right angle to all others; no difference at all, or
    models that cancel (denominator below 1e-6), gives the base. Opposing models (cos θ < 0) lead away from their mean, as
    the formula says. With filter_wise a convolution has one ratio for each output channel (mergekit: for each row of its
    last dimension); a vector has one. mergekit takes products of norms below 1e-6 as 1e-6, which makes small differences
    look as if at right angles.

    Formula: base + t (mean − base), t = N cos θ / (1 + (N − 1) cos θ), θ between xᵢ − base and xⱼ − base
    Source: Jang et al. 2024, "Model stock: all we need is just a few fine-tuned models"; mergekit (model_stock)

    Args:
        tensors: two or more, of one shape.
        base: of the same shape.
        filter_wise: on for ratios by output channel.
    """
    by_row = filter_wise and base.ndim > 1
    gram = sdkernels.reduce.gram(tensors, center=base, rows=by_row)
    count = len(tensors)
    ratio = _stock_ratio(gram.reshape(-1, count, count))
    if not by_row:
        share = ratio.item() / count
        return sdkernels.linear.combine(((1.0, base), *((share, x, base) for x in tensors)))
    change = sdkernels.linear.combine(tuple((1.0 / count, x, base) for x in tensors))
    change *= ratio.to(change.dtype).reshape(-1, *(1,) * (change.ndim - 1))
    return change.add_(base)


@method(elementwise=False, mixed=True, at_least=1)
def sce(
    *tensors: "Tensor",
    base: "Tensor",
    select_topk: Annotated[
        float, Param("share of the elements that is taken: those that differ most", 0, 1, weight=True)
    ] = 1.0,
) -> "Tensor":
    """SCE: select the elements in which models differ most, weigh models by their squared changes, erase minority signs.

    Of the m elements in which the models differ at all, those whose variance is at least the ⌊select_topk · m⌋-th largest
    are taken; where several tie there, all of them (mergekit: exactly so many). With 1 nothing is selected; below 1, models
    that all agree give the base. The elected sign is that of Σ Δᵢ, + where it is 0. Weights are wᵢ = Σ Δᵢ² over the
    selected elements, by their sum; equal where that is 0 (mergekit: below a mean of 1e-6, which small changes never reach,
    and it takes sums of agreeing weights below 1e-6 as 1e-6).

    Formula: base + Σ wᵢ Δᵢ / Σ wᵢ, over the models whose Δᵢ has the elected sign
    Source: Wan et al. 2024, "FuseChat: knowledge fusion of chat models"; mergekit (sce)

    Args:
        tensors: tensors of one shape.
        base: of the same shape.
        select_topk: 0 gives the base.
    """
    import torch

    dtype = wide(base, *tensors)
    out = torch.zeros(base.shape, dtype=dtype, device=base.device)
    least = 0.0 if select_topk >= 1 else _least_spread(tensors, select_topk, out)
    energy = torch.zeros(len(tensors), dtype=torch.float64, device=base.device)
    for _, _, deltas in _selected(tensors, base, least, out):
        energy += deltas.double().square_().sum(1)
    weights = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(tensors))
    for spread, part, deltas in _selected(tensors, base, least, out):
        positive = deltas.sum(0) >= 0
        agreeing = torch.where(positive, deltas > 0, deltas < 0) * weights.to(dtype).unsqueeze(1)
        divisor = agreeing.sum(0)
        change = (deltas * agreeing).sum(0).div_(divisor.where(divisor > 0, 1.0))
        spread.copy_(change.add_(part))  # `out` held the spread up to here
    return out


@method(mixed=True)
def nearswap(
    a: "Tensor",
    b: "Tensor",
    *,
    t: Annotated[float, Param("how far an element may move", 0, weight=True)] = 0.0001,
) -> "Tensor":
    """Move every element of A towards B, by t at most: elements nearer than that become B's.

    The same as A + w (B − A) with w = min(1, t / |A − B|). mergekit takes |A − B| below 1e-6 as 1e-6, which matters only
    for t below that.

    Formula: A + clamp(B − A, −t, t)
    Source: alchemonaut, "QuartetAnemoi-70B"; mergekit (nearswap, whose base model is A)

    Args:
        a, b: tensors of one shape.
        t: in the units of the weights; 0 gives A.
    """
    import torch

    dtype = wide(a, b)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    gap = wide_b - wide_a
    return torch.where(gap.abs() <= t, wide_b, gap.clamp_(-t, t).add_(wide_a))


@method(elementwise=False, mixed=True)
def arcee_fusion(
    a: "Tensor",
    *,
    base: "Tensor",
) -> "Tensor":
    """Take from A only the elements that matter most: large changes in rows whose softmax changed.

    A row is one output channel, all that one index of the first dimension holds; a vector is one row. Q1, Q2 and Q3 are
    the elements at ⌊(n − 1) / 4⌋, ⌊(n − 1) / 2⌋ and ⌊3 (n − 1) / 4⌋ of all scores in order. A score of 0 is never taken, so
    equal models, and rows that the softmax does not tell apart (one element, or shifted by a constant), stay the base's.
    mergekit has the softmax over the last dimension of a convolution too, takes everything where all scores are 0, samples
    the quartiles of large tensors at random, and adds 1e-8 to probabilities.

    Formula: A where s ≥ Q2 + 1.5 (Q3 − Q1), else base; s = |A − base| · KL(softmax(A) ‖ softmax(base)), by row
    Source: mergekit (arcee_fusion)

    Args:
        a: the model, any shape.
        base: of the same shape.
    """
    import torch

    dtype = wide(a, base)
    score = torch.zeros(a.shape, dtype=dtype, device=a.device)
    count = a.numel()
    if not count:
        return score
    rows = a.shape[0] if a.ndim > 1 else 1
    for into, x, y in blocks(score, a, base, rows=rows):
        p, q = x.double().log_softmax(1), y.double().log_softmax(1)
        divergence = (p.exp() * (p - q)).sum(1, keepdim=True).clamp_(min=0)
        into.copy_((x.to(dtype) - y.to(dtype)).abs_() * divergence)
    lower, median, upper = (
        sdkernels.select.kth_magnitude(score, count - at * (count - 1) // 4).item() for at in (1, 2, 3)
    )
    least = median + 1.5 * (upper - lower)
    for into, x, y in blocks(score, a, base):
        into.copy_(torch.where((into >= least) & (into > 0), x.to(dtype), y.to(dtype)))
    return score


def _stock_ratio(gram: "Tensor") -> "Tensor":
    """Return t for each matrix of dot products in ``gram[rows, n, n]``, float64."""
    import torch

    count = gram.shape[1]
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    product = norms.unsqueeze(1) * norms.unsqueeze(2)
    usable = (product > 0) & product.isfinite()
    cosines = torch.where(usable, gram / product.where(usable, 1.0), 0.0).clamp(-1, 1)
    first, second = torch.triu_indices(count, count, 1, device=gram.device)
    cos = cosines[:, first, second].mean(1)
    divisor = 1 + (count - 1) * cos
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0.0, count * cos / divisor.masked_fill(singular, 1.0))


def _least_spread(tensors: "tuple[Tensor, ...]", share: float, out: "Tensor") -> float:
    """Write each element's standard deviation over the models to `out`; return the smallest that is selected."""
    import torch

    for into, *parts in blocks(out, *tensors):
        values = torch.stack([x.double() for x in parts])
        values -= values[0].clone()  # from the first model: exactly 0 where all agree
        into.copy_(values.sub_(values.mean(0)).square_().mean(0).sqrt_())
    chosen = int(share * int(out.count_nonzero()) * (1 + 1e-12))  # 0.7 · 360 comes out just below 252
    return sdkernels.select.kth_magnitude(out, chosen).item() if chosen else math.inf


def _selected(
    tensors: "tuple[Tensor, ...]", base: "Tensor", least: float, spread: "Tensor"
) -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
    """Walk through blocks: a part of `spread` and of the base, and the differences [models, n], 0 where not selected."""
    import torch

    def differences(parts: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor, Tensor]":
        into, part, *models = parts
        origin = part.to(into.dtype)
        deltas = torch.stack([x.to(into.dtype) - origin for x in models])
        return into, origin, deltas.masked_fill_(into < least, 0) if least else deltas

    return map(differences, blocks(spread, base, *tensors))
