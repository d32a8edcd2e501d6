"""Large cases and plain torch expressions for kernels that bring none of their own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdkernels.kernel import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _magnitudes(moved: int) -> Case:
    """The threshold of the largest fifth of a difference of two fp16 tensors; every byte is counted once."""
    return Case("fp16-base-0.2", partial(_make_magnitudes, moved // 4), moved // 4 * 4)


def _make_magnitudes(count: int, device: torch.device) -> tuple[Any, ...]:
    x, base = (torch.randn(count, device=device).half() for _ in range(2))
    return x, max(1, count // 5), base


def _plain_magnitude(x: Tensor, k: int, base: Tensor) -> Tensor:
    delta = (x.float() - base.float()).abs()
    return torch.kthvalue(delta, delta.numel() - k + 1).values


def _elections(moved: int) -> Case:
    """Three fp16 models against a base, thresholds near the largest fifth: four tensors in, float32 out."""
    return Case("fp16-3", partial(_make_elections, moved // 12), moved // 12 * 12)


def _make_elections(count: int, device: torch.device) -> tuple[Any, ...]:
    base = torch.randn(count, device=device).half()
    tensors = [base + (0.1 * torch.randn(count, device=device)).half() for _ in range(3)]
    return base, tensors, [0.5, 0.3, 0.2], [0.128, 0.128, 0.128]


def _plain_election(base: Tensor, tensors: list[Tensor], weights: list[float], thresholds: list[float]) -> Tensor:
    deltas = torch.stack([x.float() - base.float() for x in tensors])
    kept = deltas * (deltas.abs() >= torch.tensor(thresholds, device=base.device)[:, None])
    weight = torch.tensor(weights, device=base.device)[:, None]
    agrees = (kept.sign() == (weight * kept).sum(0).sign()) & (kept != 0)
    total = (weight * agrees).sum(0)
    return base.float() + (weight * kept * agrees).sum(0) / torch.where(total == 0, 1.0, total)


LARGE: dict[str, tuple[Callable[[int], Case], Callable[..., Any]]] = {
    "select.kth_magnitude": (_magnitudes, _plain_magnitude),
    "ties.merge": (_elections, _plain_election),
}
