"""Random tensors, and calls of merge methods as the runner makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdmerge.method import Place, find

if TYPE_CHECKING:
    from torch import Tensor

PLACE = Place("model.weight")


def call(name: str, tensors: list[Tensor], base: Tensor | None = None, **values: Any) -> Tensor:
    """Run a method as the runner does: parameters checked, tensors widened unless it takes them as stored.

    The last of `tensors` is the base where it needs one.
    """
    method = find(name)
    if not method.mixed:
        wide = torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32
        tensors = [x.to(wide) for x in tensors]
        base = None if base is None else base.to(wide)
    if method.base == "required" and base is None:
        *tensors, base = tensors
    extra: dict[str, Any] = method.check(len(tensors), values)
    if base is not None:
        extra["base"] = base
    if method.takes_place:
        extra["place"] = PLACE
    if method.siblings is not None:
        extra["beside"] = [{} for _ in tensors]
    return method.function(*tensors, **extra)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
