"""The best approximation of a layer's change at a rank: as two factors, or in Tucker's form, which has a small core between them.

A convolution (out, in, kh, kw) is flattened to (out, in · kh · kw), and then has a down as wide as that; or it is
Σ up[o,m] mid[m,n,…] down[n,i], where both factors are as thin as a pixel's. That is smaller at the same rank, and loses more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sdkernels import philox, subspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sdformats.adapters.records import LoRA
    from sdmerge.lora.shrink import Form

_START = 32
"""Vectors that a search starts with beyond the rank."""
_NOTHING = 1e-6
"""Lengths below this part of the largest are not told from rounding."""
_ROUNDING = 1e-6
"""A squared error below this part of the change's squared norm may be float32's."""
_SWEEPS = 12
_STILL = 1e-4
"""A sweep that makes the error smaller by less than this part of it is the last."""


@dataclass(frozen=True, kw_only=True)
class Found(ABC):
    """What a layer gave.

    Attributes:
        total: the squared norm of the change.
        best: what any approximation of the largest rank could keep of it at most.
        method: how it was found.
    """

    total: float
    best: float
    method: str

    @abstractmethod
    def kept(self, rank: int) -> float:
        """Return the squared norm of the approximation of a rank."""

    @abstractmethod
    def lora(self, form: Form, rank: int) -> LoRA:
        """Return that approximation."""

    @property
    @abstractmethod
    def most(self) -> int:
        """The largest rank."""

    def error(self, rank: int) -> float:
        """Return ‖Δ - Δ'‖ / ‖Δ‖ at a rank."""
        return math.sqrt(max(0.0, self.total - self.kept(rank)) / self.total) if self.total else 0.0

    @property
    def excess(self) -> float:
        """How much larger than the smallest possible the error at the largest rank is at most."""
        return excess(1 - self.kept(self.most) / self.total, 1 - self.best / self.total) if self.total else 0.0


def excess(left: float, least: float) -> float:
    """Return how much larger an error is than the smallest possible.

    Args:
        left, least: both squared, as parts of the change's squared norm. What may be float32's rounding is none.
    """
    return math.sqrt(max(0.0, left) / least) - 1 if least > _ROUNDING and left > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Flat(Found):
    """Two factors, √σ on both, as many components as any output needs.

    Attributes:
        up, down: (m, r), (r, n).
        squares: their σ².
    """

    up: Tensor
    down: Tensor
    squares: Tensor

    @property
    def most(self) -> int:
        return self.squares.numel()

    def kept(self, rank: int) -> float:
        return float(self.squares[:rank].sum())

    def lora(self, form: Form, rank: int) -> LoRA:
        return form.lora(rank, self.up[:, :rank], self.down[:rank])


@dataclass(frozen=True, kw_only=True)
class Core(Found):
    """Tucker's form at one rank.

    Attributes:
        up, mid, down: (out, r), (r, r, kh, kw), (r, in).
        square: the squared norm of what they make.
    """

    up: Tensor
    mid: Tensor
    down: Tensor
    square: float

    @property
    def most(self) -> int:
        return self.mid.shape[0]

    def kept(self, rank: int) -> float:
        assert rank == self.most, "made for one rank"
        return self.square

    def lora(self, form: Form, rank: int) -> LoRA:
        assert rank == self.most, "made for one rank"
        return form.lora(rank, self.up, self.down, self.mid)


def flattened(change: Tensor, rank: int, path: str, tolerance: float, store: Callable[[Tensor], Tensor]) -> Flat:
    """Approximate a change as a matrix.

    Args:
        change: (m, …), float32, on the device that computes.
        rank: components, at most as many as there are.
        path: the layer, from which the numbers follow that a search starts with.
        tolerance: how much larger than the smallest possible the error may be.
        store: makes of a factor what is kept in memory.
    """
    change = change.flatten(1)
    tall = change.shape[0] > change.shape[1]
    small = change.T.contiguous() if tall else change
    part = subspace.leading(small, rank, _start(path, small, rank), tolerance)
    left = part.vectors
    right = left.T @ small
    squares = right.double().square().sum(1)
    root = squares.sqrt().sqrt().float()
    near, far = left * root, right / root.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    up, down = (far.T, near.T) if tall else (near, far)
    best = max(part.best, float(squares.sum()))
    return Flat(up=store(up), down=store(down), squares=squares.cpu(), total=part.total, best=best, method=part.method)


def tucker(change: Tensor, rank: int, path: str, tolerance: float, store: Callable[[Tensor], Tensor]) -> Core:
    """Approximate a convolution in Tucker's form, by higher-order orthogonal iteration (De Lathauwer 2000).

    Each factor in turn becomes the best for the other, until that gains no more. The bound is that of either side alone: no
    core keeps more than the best matrix of its rank, whichever way the change is flattened.

    Args:
        change: (out, in, kh, kw), float32.
        rank: of both factors, less than both sides.
        path, tolerance, store: as of `flattened`.
    """
    rows = _leading_rows(change, rank, f"{path}/rows", tolerance)
    columns = _leading_rows(change.transpose(0, 1), rank, f"{path}/columns", tolerance)
    total, best = rows.total, min(rows.best, columns.best)
    u, v = rows.vectors, columns.vectors
    core, kept = _core(change, u, v)
    for _ in range(_SWEEPS):
        if total - kept <= (1 + tolerance) ** 2 * (total - best):
            break
        u = _leading_rows(torch.einsum("oihw,in->onhw", change, v), rank, f"{path}/rows", tolerance).vectors
        inner = torch.einsum("oihw,om->imhw", change, u)
        v = _leading_rows(inner, rank, f"{path}/columns", tolerance).vectors
        core, now = _core(change, u, v)
        gained, kept = now - kept, max(now, kept)
        if gained <= _STILL * (total - kept):
            break
    # Both factors in the order of what their components carry, which is spread evenly over the three.
    u, first = _ordered(u, core.flatten(1))
    v, second = _ordered(v, core.transpose(0, 1).flatten(1))
    core, kept = _core(change, u, v)
    mid = core / (first[:, None] * second)[:, :, None, None]
    return Core(
        up=store(u * first),
        mid=store(mid),
        down=store((v * second).T),
        square=kept,
        total=total,
        best=max(best, kept),
        method="tucker",
    )


def tucker_curve(change: Tensor) -> Tensor:
    """Return, as if they were singular values, the roots of what each rank of Tucker's form adds to the squared norm.

    By the higher-order singular value decomposition, truncated: nearly the best for each rank, for all ranks at once.

    Args:
        change: (out, in, kh, kw), float32.

    Returns:
        (min(out, in) - 1,), float64: beyond that one side is whole, and flattening is smaller.
    """
    u, v = (_leading_rows(side, None, "", 0.0).vectors for side in (change, change.transpose(0, 1)))
    most = min(change.shape[:2]) - 1
    core, _ = _core(change, u[:, :most], v[:, :most])
    energies = core.double().square().sum((2, 3)).cumsum(0).cumsum(1).diagonal()
    steps: Tensor = energies.diff(prepend=energies.new_zeros(1)).clamp(min=0).sqrt().cpu()
    return steps


def singular_values(change: Tensor) -> Tensor:
    """Return those of a change as a matrix: (min(m, n),), float64, the largest first."""
    change = change.flatten(1)
    small = change if change.shape[0] <= change.shape[1] else change.T
    squares: Tensor = torch.linalg.eigvalsh(subspace.gram(small))
    return squares.flip(0).clamp(min=0).double().sqrt().cpu()


def _leading_rows(change: Tensor, rank: int | None, path: str, tolerance: float) -> subspace.Leading:
    """Return the leading left singular vectors of a change as a matrix, orthonormal whatever its shape."""
    matrix = change.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    small = (matrix if wide else matrix.T).contiguous()
    start = None if rank is None else _start(path, small, rank)
    found = subspace.leading(small, rank, start, tolerance)
    return found if wide else replace(found, vectors=torch.linalg.qr(matrix @ found.vectors)[0])


def _core(change: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, float]:
    core = torch.einsum("mihw,in->mnhw", torch.einsum("oihw,om->mihw", change, u), v)
    return core, float(core.double().square().sum())


def _ordered(factor: Tensor, unfolded: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a factor's columns to the core's principal axes; return it and the cube roots of their lengths."""
    values, turn = torch.linalg.eigh(subspace.gram(unfolded.double()))
    lengths = values.flip(0).clamp(min=0).sqrt()
    lengths = lengths.clamp(min=max(_NOTHING * float(lengths[0]), torch.finfo(torch.float32).tiny))
    turned: Tensor = factor.double() @ turn.flip(1)
    return turned.float(), lengths.pow(1 / 3).float()


def _start(path: str, matrix: Tensor, rank: int) -> Tensor:
    """Return numbers to start a search in a matrix with, one for each of its rows: the same for the same layer anywhere."""
    count = matrix.shape[0] * (rank + _START)
    words = philox.Stream(philox.key(0, path), count).take(0, count)
    numbers: Tensor = torch.from_numpy(words.view("int32").astype("float32"))
    return numbers.reshape(matrix.shape[0], -1).to(matrix.device) * 2.0**-31
