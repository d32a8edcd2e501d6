"""TIES: elect a sign for each element, and average the changes that have it.

Of each model's change Δ = x − base only |Δ| ≥ its threshold counts (`sdkernels.select` finds the thresholds). The models
vote with w·Δ: by the sign of its sum, or by the number of models on each side; an even ballot goes to +, as in mergekit.
A change of zero has neither a vote nor a share in the divisor.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdkernels import flat, native
from sdkernels.cast import accumulator
from sdkernels.kernel import Case, Kernel, tl, triton

_IN_ONE_LAUNCH = 4
_SPAN = 1 << 18  # many cheap passes: the calls cost more than a larger cache's distance
_BLOCK = 1024


def reference(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float | Tensor],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    vote: str = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """Return base + scale · Σ w Δ / Σ w over the models whose w Δ has the elected sign.

    Args:
        base: any shape, any floating type.
        tensors: at least one of the same shape, any floating types.
        weights: one for each.
        thresholds: one for each, a number or a tensor of one element; NaN keeps nothing.
        scale: for the merged change.
        normalize: False leaves out the divisor.
        vote: ``sum`` or ``count``.
        out: where to round the result to, of the same shape.

    Returns:
        `out`, or a new tensor in float32 (float64 where an input is).
    """
    wide = accumulator(base.dtype, *(x.dtype for x in tensors))
    edges = [_below(threshold, wide) for threshold in thresholds]
    shares = [float(weight) for weight in weights]
    bases, models = base.reshape(-1), [x.reshape(-1) for x in tensors]
    result = flat.target(base, wide, out)
    span = max(_SPAN, flat.span(base))
    ballot = _Ballot(min(span, bases.numel()), wide, base.device, normalize=normalize, by_count=vote == "count")
    for start in range(0, bases.numel(), span):
        part = slice(start, start + span)
        origin = bases[part].to(wide)
        merged = ballot.held(origin, [x[part] for x in models], shares, edges)
        if result.dtype == wide:
            torch.add(origin, merged, alpha=scale, out=result[part])
        else:
            result[part] = torch.add(origin, merged, alpha=scale)
    return flat.deliver(result, base, out)


class _Ballot:
    """The buffers of one election, used again for every span.

    Masks are numbers, 0 and 1, and chosen by multiplication: on a CPU torch.where costs more than all the rest.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, *, normalize: bool, by_count: bool) -> None:
        self._buffers = torch.empty((4, size), dtype=dtype, device=device)
        self._normalize = normalize
        self._by_count = by_count

    def held(
        self, origin: Tensor, models: Sequence[Tensor], weights: Sequence[float], edges: Sequence[float]
    ) -> Tensor:
        """Return the merged change of one span, in a buffer."""
        side, sign, total, divisor = self._buffers[:, : origin.numel()].unbind()
        total.zero_()
        changes = []
        for x, weight, edge in zip(models, weights, edges, strict=True):
            side.copy_(x)
            change = torch.nn.functional.hardshrink(side.sub_(origin), edge)
            changes.append(change if weight == 1 else change.mul_(weight))
            total.add_(torch.sign(change, out=side) if self._by_count else change)
        torch.ge(total, 0, out=sign)
        sign.mul_(2).sub_(1)
        total.zero_()
        divisor.zero_()
        for change, weight in zip(changes, weights, strict=True):
            total.add_(torch.clamp_min_(change.mul_(sign), 0))
            if self._normalize:
                divisor.add_(torch.gt(change, 0, out=side), alpha=weight)
        total.mul_(sign)
        if not self._normalize:
            return total
        return total.div_(divisor.add_(torch.eq(divisor, 0, out=side)))


def _below(threshold: float | Tensor, dtype: torch.dtype) -> float:
    """Return the largest number below a threshold: what is above it is kept."""
    exact = torch.as_tensor(threshold, dtype=dtype).reshape(())
    if exact.isnan():
        return math.inf
    return float(torch.nextafter(exact, torch.zeros_like(exact)).item()) if exact > 0 else 0.0


def in_native_code(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float | Tensor],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    vote: str = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """Do what `reference` does in one pass over the memory: see ties.c."""
    wide = accumulator(base.dtype, *(x.dtype for x in tensors))
    result = torch.empty(base.shape, dtype=wide) if out is None else out
    edges = [_below(threshold, wide) for threshold in thresholds]
    models = list(zip(tensors, map(float, weights), edges, strict=True))
    if native.elect(base, models, result, scale=scale, normalize=normalize, by_count=vote == "count"):
        return result
    return reference(base, tensors, weights, thresholds, scale=scale, normalize=normalize, vote=vote, out=out)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cast_vote(x, origin, weight, edge, at, inside):  # type: ignore[no-untyped-def]
    change = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - origin
    return tl.where(tl.abs(change) > edge, change * weight, 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _election(  # type: ignore[no-untyped-def]
    out, base, x0, x1, x2, x3, w0, w1, w2, w3, e0, e1, e2, e3, scale, count,
    MODELS: tl.constexpr, NORMALIZE: tl.constexpr, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    origin = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    down = tl.zeros((BLOCK,), dtype=tl.float32)
    up_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    down_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    votes = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(MODELS):
        x = x0 if i == 0 else x1 if i == 1 else x2 if i == 2 else x3
        weight = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
        edge = e0 if i == 0 else e1 if i == 1 else e2 if i == 2 else e3
        change = _cast_vote(x, origin, weight, edge, at, inside)
        total += change
        up += tl.where(change > 0, change, 0.0)
        down += tl.where(change < 0, change, 0.0)
        up_weight += tl.where(change > 0, weight, 0.0)
        down_weight += tl.where(change < 0, weight, 0.0)
        votes += tl.where(change > 0, 1.0, 0.0) - tl.where(change < 0, 1.0, 0.0)
    upward = total >= 0
    if BY_COUNT:
        upward = votes >= 0
    merged = tl.where(upward, up, down)
    if NORMALIZE:
        divisor = tl.where(upward, up_weight, down_weight)
        merged = tl.div_rn(merged, tl.where(divisor == 0, 1.0, divisor))
    result = tl.fma(merged, tl.zeros_like(merged) + scale, origin)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def fast(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float | Tensor],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    vote: str = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """Do what `reference` does, in one launch for up to four models of floating types of 16 and 32 bits."""
    wide = accumulator(base.dtype, *(x.dtype for x in tensors))
    narrow = any(x.dtype.itemsize == 1 for x in (base, *tensors, *(() if out is None else (out,))))
    if wide == torch.float64 or narrow or len(tensors) > _IN_ONE_LAUNCH or not base.numel():
        return reference(base, tensors, weights, thresholds, scale=scale, normalize=normalize, vote=vote, out=out)
    result = flat.target(base, wide, out)
    spare = _IN_ONE_LAUNCH - len(tensors)
    xs = [x.contiguous() for x in tensors] + [base] * spare
    shares = [float(weight) for weight in weights] + [0.0] * spare
    edges = [_below(threshold, wide) for threshold in thresholds] + [0.0] * spare
    _election[(triton.cdiv(base.numel(), _BLOCK),)](
        result, base.contiguous(), *xs, *shares, *edges, float(scale), base.numel(),
        MODELS=len(tensors), NORMALIZE=normalize, BY_COUNT=vote == "count", BLOCK=_BLOCK,
    )  # fmt: skip
    return flat.deliver(result, base, out)


def cases() -> Iterable[Case]:
    """Every input type, one to four models, both votes, with and without divisor, ties and equal models."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for count, models in ((1, 1), (1023, 2), (4097, 3), (2048, 4)):
            name = f"{str(dtype).removeprefix('torch.')}-{count}-{models}"
            yield Case(name, partial(_make, dtype, count, models), count * (dtype.itemsize * (models + 1) + 4))


def _make(dtype: torch.dtype, count: int, models: int, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(count)

    def tensor() -> Tensor:
        return (torch.randn(count, generator=source) * 4).round().div(4).to(dtype).to(device)

    return tensor(), [tensor() for _ in range(models)], [1.0, 0.5, 0.75, 2.0][:models], [0.5, 1.0, 0.0, 0.25][:models]


merge = Kernel("ties.merge", reference, fast, cases, native=in_native_code)
