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


LARGE: dict[str, tuple[Callable[[int], Case], Callable[..., Any]]] = {
    "select.kth_magnitude": (_magnitudes, _plain_magnitude),
}
