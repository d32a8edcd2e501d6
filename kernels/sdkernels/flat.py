"""Whole tensors as flat ones, and the spans in which the references compute."""

import torch
from torch import Tensor

_CACHED = 1 << 16
_WHOLE = 1 << 24


def span(x: Tensor) -> int:
    """Return how many elements to compute at once: what the cache of a CPU core holds, or enough to fill a GPU.

    It depends on nothing else, so that the results don't either.
    """
    return _CACHED if x.device.type == "cpu" else _WHOLE


def target(like: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return the flat tensor to write results to: `out`'s own memory where it is contiguous, else new memory."""
    if out is not None and out.is_contiguous():
        return out.view(-1)
    return torch.empty(like.numel(), dtype=dtype if out is None else out.dtype, device=like.device)


def deliver(flat: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """Return what was written to `target` in the shape of `like`: in `out` where there is one."""
    shaped = flat.view(like.shape)
    if out is None:
        return shaped
    return out if out.is_contiguous() else out.copy_(shaped)
