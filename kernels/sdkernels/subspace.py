"""The leading singular vectors of a matrix: the Gram matrix of its smaller side, and subspace iteration on that.

The Gram matrix costs one product, after which every pass over it is cheap; in float32 it loses only singular values below
3e-4 of the largest. Passes are shifted (dashSVD, arXiv 2404.09276) and end as soon as a bound on the best possible
approximation shows that no other of the same rank could be much better; else all eigenvalues are computed.

The bound: in a basis of Ritz vectors G is [[Θ, Eᵀ], [E, C]], which for any δ > 0 is no larger than diag(Θ + EᵀE / δ, C + δ I),
so the r largest eigenvalues of G add up to no more than the r largest of that. EᵀE is the residuals' Gram matrix; ‖C‖ is
estimated by block power iteration, with 3 % on top.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_OVERSAMPLING = 32
_SMALL = 400
"""Sides up to which all eigenvalues are as cheap as some."""
_MOST_PASSES = 16
_STRIPES = 4
_DELTAS = 6
_PASSES_OUTSIDE = 4


@dataclass(frozen=True)
class Leading:
    """The leading part of a matrix.

    Attributes:
        vectors: (d, k), orthonormal: singular vectors of the smaller side, the leading one first.
        squares: (k,), float64: squared singular values.
        total: the matrix's squared Frobenius norm.
        best: what the squares of the first `rank` singular values add up to at most.
        method: ``eigen`` or ``subspace``.
    """

    vectors: Tensor
    squares: Tensor
    total: float
    best: float
    method: str


def gram(rows: Tensor) -> Tensor:
    """Return rows · rowsᵀ, (d, d), in the type of `rows`: the blocks on and above the diagonal, a third less work than all."""
    count = rows.shape[0]
    upper = torch.zeros(count, count, dtype=rows.dtype, device=rows.device)
    edges = [count * i // _STRIPES for i in range(_STRIPES + 1)]
    for start, stop in pairwise(edges):
        upper[start:stop, start:] = rows[start:stop] @ rows[start:].T
    return upper.triu() + upper.triu(1).T


def leading(a: Tensor, rank: int | None, start: Tensor | None = None, tolerance: float = 0.01) -> Leading:
    """Find the leading singular vectors of the smaller side of a matrix.

    Args:
        a: (d, n) with d <= n, float32.
        rank: how many are wanted; None: all of them.
        start: (d, at least rank + 32) numbers to begin with, any that are not special; None: all are computed.
        tolerance: how much larger than the smallest possible the error of the approximation may be.
    """
    g = gram(a)
    total = float(g.diagonal().double().sum())
    side = g.shape[0]
    few = rank is not None and start is not None and side > _SMALL and 3 * (rank + _OVERSAMPLING) < side
    if few and rank is not None and start is not None and total > 0:
        found = _iterated(g, total, rank, start[:, : rank + _OVERSAMPLING], tolerance)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(g)
    squares = values.flip(0).clamp(min=0).double()
    wanted = side if rank is None else min(rank, side)
    return Leading(vectors.flip(1)[:, :wanted], squares[:wanted], total, float(squares[:wanted].sum()), "eigen")


def _iterated(g: Tensor, total: float, rank: int, start: Tensor, tolerance: float) -> Leading | None:
    """Iterate until the bound is met; None where it is not."""
    q = torch.linalg.qr(g @ start)[0]
    shift = 0.0
    for number in range(_MOST_PASSES):
        image = g @ q
        values, turn = torch.linalg.eigh(q.T @ image)
        values, turn = values.flip(0), turn.flip(1)
        if number >= 2 and number % 2 == 0:
            q, image = q @ turn, image @ turn
            kept = float(values[:rank].clamp(min=0).double().sum())
            best = min(total, certified(g, q, image, values, rank))
            if total - kept <= (1 + tolerance) ** 2 * (total - best) or total - kept <= 1e-9 * total:
                return Leading(q[:, :rank], values[:rank].clamp(min=0).double(), total, best, "subspace")
        # A shift of half the smallest value found speeds up what lies above it and harms nothing.
        shift = max(shift, float(values[-1]) / 2)
        q = torch.linalg.qr(image - shift * q)[0]
    return None


def certified(g: Tensor, q: Tensor, image: Tensor, values: Tensor, rank: int) -> float:
    """Return what the `rank` largest eigenvalues of `g` add up to at most; see the module.

    Args:
        g: (d, d).
        q: (d, b), orthonormal Ritz vectors.
        image: g q.
        values: (b,), their Ritz values.
    """
    residual = (image - q * values).double()
    outside = residual.T @ residual
    theta = torch.diag(values.double())
    bound = 1.03 * _norm_outside(g, q)
    best = float("inf")
    scale = float(values[rank - 1].double().clamp(min=1e-30))
    for i in range(_DELTAS):
        delta = scale * 10.0 ** (-5 + 5 * i / (_DELTAS - 1))
        spread = torch.linalg.eigvalsh(theta + outside / delta).flip(0)[:rank]
        best = min(best, float(spread.clamp(min=bound + delta).sum()))
    return best


def _norm_outside(g: Tensor, q: Tensor) -> float:
    """Estimate the largest eigenvalue of `g` outside of the span of `q`, by a few passes of a block of sixteen vectors."""
    x = g[:, :16]
    for _ in range(_PASSES_OUTSIDE):
        x = torch.linalg.qr(x - q @ (q.T @ x))[0]
        x = g @ x
    x = torch.linalg.qr(x - q @ (q.T @ x))[0]
    return float(torch.linalg.eigvalsh(x.T @ (g @ x))[-1])
