"""Methods that take a tensor for a matrix: rotate one onto another, keep only the largest singular values.

Everything is in float64, tall matrices block by block of their rows, so that a tensor of many rows takes little more memory
than its result.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, method
from sdmerge.methods._shared import rows_at_once, wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_PHASES = (0.7, 1.9, 2.6)
"""Where the circle is folded to tell eigenvalues apart; any angles but multiples of π / 2."""

_HALF_TURN = 1e-7
"""Radians: angles nearer than this to π count as π."""


@method(elementwise=False, mixed=True)
def rotate(
    a: "Tensor",
    b: "Tensor",
    *,
    base: "Tensor | None" = None,
    alignment: Annotated[float, Param("how far A is rotated: 0 not at all, 1 onto B", 0, 1, weight=True)] = 1.0,
    alpha: Annotated[float, Param("share of B, rotated back to A first", weight=True)] = 0.0,
    centralization: Annotated[float, Param("share of the rows' mean that is not rotated but blended", 0, 1)] = 1.0,
) -> "Tensor":
    """Rotate A towards B: the orthogonal transform of A's rows that brings them nearest to B's, or a part of the way.

    With a base, A − base is rotated towards B − base. Rows are the output channels of a linear layer; of a convolution with
    a kernel, every kernel is one. Alignment and α 0 give A, both 1 give B; equal tensors stay, and a vector is
    (1 − α) A + α B. A reflection, where B asks for one, is allowed at alignment 1 only. An angle of exactly π (B opposite to
    A) has no shorter side: parts of the way shrink by cos(πt) there.

    With more columns than rows, or dependent rows, R is only known for a part of the space: its row space goes the shortest
    way (by t of every principal angle), and rows turn by the t-th power within it. sd-mecha instead leaves the part of A
    that B's row space lacks in the result beside what it was turned into, so that lengths grow; and it does nothing where A
    and B agree to half precision. Wide matrices take up to ten times their size in float32.

    Formula: ((1 − α) A + α B Rᵀ) Rᵗ + (1 − t) mean(A) + t mean(B), R = U Vᵀ of the SVD U S Vᵀ = Aᵀ B, A and B less means
    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem"; Björck, Golub 1973 (principal
    angles); sd-mecha (rotate)

    Args:
        a, b: tensors of one shape.
        base: of the same shape.
        alignment: the t of the formula.
        alpha: the α of the formula.
        centralization: factor of the means.
    """
    import torch

    dtype = wide(a, b, base)
    if a.ndim < 2 or alignment == alpha == 0 or alignment == alpha == 1 or torch.equal(a, b):
        return sdkernels.lerp.blend(a.to(dtype), b.to(dtype), alpha)
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    if not a.numel():
        return out
    shape = _kernels(a) if a.ndim == 4 and a.shape[2:].numel() > 1 else (a.shape[0], -1)
    rows_a, rows_b, into = a.reshape(shape), b.reshape(shape), out.view(shape)
    origin = None if base is None else base.reshape(shape)
    mean_a, mean_b = (_mean(x, origin) * centralization for x in (rows_a, rows_b))
    turn = _procrustes((rows_a, mean_a), (rows_b, mean_b), origin, proper=alignment not in (0, 1))
    if turn is None:
        return out.fill_(math.nan)
    mean = mean_a.lerp(mean_b, alignment)
    share = turn.power(alignment)
    for at in _spans(rows_a):
        x = _difference(rows_a, origin, at).sub_(mean_a)
        if alpha != 0:
            x = x.lerp_(turn.back(_difference(rows_b, origin, at).sub_(mean_b)), alpha)
        x = share(x).add_(mean)
        into[at] = x if origin is None else x.add_(origin[at])
    return out


@method(elementwise=False, mixed=True)
def truncate_rank(
    a: "Tensor",
    *,
    base: "Tensor | None" = None,
    rank: Annotated[int, Param("how many singular values are kept", 0)] = 8,
) -> "Tensor":
    """Keep what A learned over the base only as far as a matrix of low rank can hold it.

    A convolution is a matrix of output channels by all the rest. Exactly A where the rank is no smaller than the matrix
    allows, and for vectors; exactly the base (0 without one) for rank 0, and where A equals it. Of equal singular values
    at the limit, some are kept. Singular values come from the eigenvectors of the smaller of ΔΔᵀ and ΔᵀΔ, in float64: those
    below 1e-8 of the largest are noise. (sd-mecha approximates by random projection unless told not to.)

    Formula: base + Σ σᵢ uᵢ vᵢᵀ over the largest σᵢ, Δ = A − base = U Σ Vᵀ
    Source: Eckart, Young 1936, "The approximation of one matrix by another of lower rank"; sd-mecha (truncate_rank)

    Args:
        a: the model, any shape.
        base: of the same shape; without it A itself is truncated.
        rank: 8 is what a LoRA of rank 8 could hold.
    """
    import torch

    dtype = wide(a, base)
    if a.ndim < 2 or not a.numel() or rank >= min(a.shape[0], a.shape[1:].numel()):
        return a.to(dtype, copy=True)
    if rank == 0 and base is not None:
        return base.to(dtype, copy=True)
    out = torch.zeros(a.shape, dtype=dtype, device=a.device)
    if rank == 0:
        return out
    rows, into, origin = _tall(a), _tall(out), None if base is None else _tall(base)
    gram = torch.zeros((rows.shape[1], rows.shape[1]), dtype=torch.float64, device=a.device)
    for at in _spans(rows):
        x = _difference(rows, origin, at)
        gram.addmm_(x.T, x)
    if not torch.isfinite(gram).all():
        return out.fill_(math.nan)
    kept = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    del gram
    for at in _spans(rows):
        x = _difference(rows, origin, at) @ kept @ kept.T
        into[at] = x if origin is None else x.add_(origin[at])
    return out


def _kernels(x: "Tensor") -> tuple[int, int]:
    return x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]


def _tall(x: "Tensor") -> "Tensor":
    """Return a view of output channels by the rest, or the other way round: no wider than high."""
    flat = x.reshape(x.shape[0], -1)
    return flat if flat.shape[0] >= flat.shape[1] else flat.T


def _spans(rows: "Tensor") -> "Iterator[slice]":
    step = rows_at_once(rows.shape[1])
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _difference(rows: "Tensor", origin: "Tensor | None", at: slice) -> "Tensor":
    """Return some rows, less the base's, in float64; in memory of their own."""
    import torch

    x = rows[at].to(torch.float64, copy=True)
    return x if origin is None else x.sub_(origin[at])


def _mean(rows: "Tensor", origin: "Tensor | None") -> "Tensor":
    import torch

    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for at in _spans(rows):
        total += _difference(rows, origin, at).sum(0)
    return total / rows.shape[0]


@dataclass(frozen=True)
class _Turn:
    """An orthogonal transform of row vectors of p elements.

    Attributes:
        within: what comes first: a rotation of the span of u, [r, r], in coordinates along u; of everything where u is None.
        u: orthonormal columns, [p, r].
        planes: what comes then: the tilt of that span, as cosines and sines of its principal angles, [r], and the first and
            second direction of each angle's plane, [p, r].
    """

    within: "Tensor"
    u: "Tensor | None" = None
    planes: "tuple[Tensor, Tensor, Tensor, Tensor] | None" = None

    def back(self, x: "Tensor") -> "Tensor":
        """Return x, undone; x is overwritten."""
        return self._inside(self._tilt(x, -1.0), self.within.T)

    def power(self, t: float) -> "_Power":
        """Return the t-th part of the transform."""
        return _Power(self, t)

    def _tilt(self, x: "Tensor", t: float) -> "Tensor":
        if self.planes is None or t == 0:
            return x
        import torch

        cosine, sine, first, second = self.planes
        angle = torch.atan2(sine, cosine) * t
        along, across = x @ first, x @ second
        less = angle.cos() - 1
        x.addmm_(along * less - across * angle.sin(), first.T)
        return x.addmm_(along * angle.sin() + across * less, second.T)

    def _inside(self, x: "Tensor", rotation: "Tensor") -> "Tensor":
        if self.u is None:
            return x @ rotation
        along = x @ self.u
        return x.addmm_(along @ rotation - along, self.u.T)


class _Power:
    """A part of a `_Turn`: of the row space's way, and of the rotation within it."""

    def __init__(self, turn: _Turn, t: float) -> None:
        self._turn = turn
        self._t = t
        self._rotation = _power(turn.within, t)

    def __call__(self, x: "Tensor") -> "Tensor":
        """Return x, transformed; x is overwritten."""
        return self._turn._tilt(self._turn._inside(x, self._rotation), self._t)


def _procrustes(
    a: "tuple[Tensor, Tensor]", b: "tuple[Tensor, Tensor]", origin: "Tensor | None", *, proper: bool
) -> _Turn | None:
    """Return the transform that takes A's rows nearest to B's; None where NaN or infinity is among them.

    Args:
        a, b: rows [n, p], and what to subtract from each, [p].
        origin: the base's rows.
        proper: whether it must be a rotation, without a reflection.
    """
    import torch

    (rows_a, mean_a), (rows_b, mean_b) = a, b
    count, width = rows_a.shape
    frames: Sequence[Tensor] = ()
    if count >= width:
        cross = torch.zeros((width, width), dtype=torch.float64, device=rows_a.device)
        for at in _spans(rows_a):
            x, y = _difference(rows_a, origin, at).sub_(mean_a), _difference(rows_b, origin, at).sub_(mean_b)
            cross.addmm_(x.T, y)
    else:  # AᵀB would be p × p, of rank n at most: the same singular values, from n × n
        everything = slice(0, count)
        pairs = [
            torch.linalg.qr(_difference(rows, origin, everything).sub_(mean).T)
            for rows, mean in ((rows_a, mean_a), (rows_b, mean_b))
        ]
        cross = pairs[0].R @ pairs[1].R.T
        frames = [pair.Q for pair in pairs]
    if not torch.isfinite(cross).all():
        return None
    u, s, vh = torch.linalg.svd(cross)
    rank = int((s > s[0] * max(count, width) * torch.finfo(torch.float64).eps).sum())
    if (
        count >= width > 1 and rank == width - 1
    ):  # usual for centred squares: the last direction is the one that is left,
        rank, proper = width, True  # but for its sign
    u, v = u[:, :rank], vh[:rank].T
    if frames:
        u, v = frames[0] @ u, frames[1] @ v
    return _turn(u, v, proper=proper)


def _turn(u: "Tensor", v: "Tensor", *, proper: bool) -> _Turn:
    """Return the transform that takes the columns of u to those of v, the span of u going the shortest way."""
    import torch

    whole = u.shape[0] == u.shape[1]
    if whole:
        within = u @ v.T
    else:
        x, cosine, yh = torch.linalg.svd(u.T @ v, full_matrices=False)
        within = yh.T @ x.T
    if proper and within.numel() and torch.linalg.slogdet(within).sign < 0:
        u = u.clone()
        u[:, -1] *= -1  # the direction that matters least
        return _turn(u, v, proper=False)
    if whole:
        return _Turn(within)
    first, last = u @ x, v @ yh.T
    across = last.sub_(first * cosine)
    sine = across.norm(dim=0)
    return _Turn(within, u, (cosine, sine, first, across.div_(sine.where(sine > 0, 1.0))))


def _power(rotation: "Tensor", t: float) -> "Tensor":
    """Return the t-th power of an orthogonal matrix, each angle taken between −π and π.

    Its symmetric and skew parts commute: cos φ · sym − i sin φ · skew is Hermitian, with the same eigenvectors, and
    eigenvalues cos(θ − φ). Two angles that this folds onto each other would mix; then another φ keeps them apart.
    """
    import torch

    if t in (0, 1) or not rotation.numel():
        return rotation if t == 1 else torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    best, least = rotation, math.inf
    for phase in _PHASES:
        symmetric, skew = (rotation + rotation.T) / 2, (rotation - rotation.T) / 2
        vectors = torch.linalg.eigh(torch.complex(math.cos(phase) * symmetric, -math.sin(phase) * skew)).eigenvectors
        moved = rotation.to(vectors.dtype) @ vectors
        values = (vectors.conj() * moved).sum(0)
        error = float((moved - vectors * values).abs().max())
        if error < least:
            angle = values.angle()
            # Rounding decides which side of a half turn it is on, and would pick a plane: the mean of both sides instead.
            turned = torch.polar(torch.ones_like(angle), angle * t)
            turned[angle.abs() > math.pi - _HALF_TURN] = math.cos(math.pi * t)
            best, least = ((vectors * turned) @ vectors.conj().T).real, error
        if error < 1e-9:
            break
    return best
