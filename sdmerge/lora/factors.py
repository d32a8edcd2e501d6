"""Singular values and best approximations of up · down, found without forming the product.

The squared singular values of U D are the eigenvalues of the small Lᵀ (D Dᵀ) L, where L Lᵀ = UᵀU. With an eigenvector q,
w = L q and λ = σ², the singular vectors are u = U (D Dᵀ w) / λ and v = Dᵀ w / σ. In float64 the Gram matrices of float32
factors lose only σ below 3e-8 ‖U‖ ‖D‖, which is less than the factors' own rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sdkernels import subspace

_NOTHING = 1e-15
"""Squared singular values below this share of what the factors' lengths allow are rounding."""


class Spectrum(ABC):
    """A matrix's singular values, and its best approximation of any rank.

    Attributes:
        sigma: in descending order, float64; what is only rounding is 0.
    """

    sigma: Tensor

    @abstractmethod
    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (m, rank) and down (rank, n) of the best approximation, with √σ on both sides."""


def spectrum_of(up: Tensor, down: Tensor) -> Spectrum:
    """Decompose up · down: by the factors, or by the product where the rank exceeds half of its smaller side.

    Args:
        up: (m, r), float32 or float64.
        down: (r, n).
    """
    if 2 * up.shape[1] > min(up.shape[0], down.shape[1]):
        return WholeSpectrum(up @ down, up.shape[1])
    return FactoredSpectrum(up, down)


class FactoredSpectrum(Spectrum):
    """Of a product of factors, which are kept; see the module."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self._up, self._down = up, down
        left = _gram(up.T)
        self._right = _gram(down)
        root, failed = torch.linalg.cholesky_ex(left)
        if failed:  # columns that depend on each other: zeros, or one adapter twice
            values, vectors = torch.linalg.eigh(left)
            root = vectors * values.clamp(min=0).sqrt()
        values, self._vectors = _eigen(root.T @ self._right @ root)
        self._vectors = root @ self._vectors
        floor = _NOTHING * float(left.trace() * self._right.trace())
        self.sigma = torch.where(values > floor, values, 0).sqrt()

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        sigma, w = self.sigma[:rank], self._vectors[:, :rank]
        up = self._up @ (self._right @ w * _power(sigma, -1.5)).to(self._up.dtype)
        down = (w * _power(sigma, -0.5)).to(self._down.dtype).T @ self._down
        return up, down


class WholeSpectrum(Spectrum):
    """Of a matrix, by the Gram matrix of its smaller side.

    Args:
        matrix: (m, n), float32 or float64.
        rank: what its rank is at most, where that is known.
    """

    def __init__(self, matrix: Tensor, rank: int | None = None) -> None:
        self._tall = matrix.shape[0] > matrix.shape[1]
        self._matrix = matrix.T if self._tall else matrix
        values, self._vectors = _eigen(_gram(self._matrix))
        self.sigma = torch.where(values > _NOTHING * values.sum(), values, 0)[:rank].sqrt()

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        sigma, left = self.sigma[:rank], self._vectors[:, :rank]
        dtype = self._matrix.dtype
        near = (left * sigma.sqrt()).to(dtype)
        far = (left * _power(sigma, -0.5)).to(dtype).T @ self._matrix
        return (far.T.contiguous(), near.T.contiguous()) if self._tall else (near, far)


def _gram(rows: Tensor) -> Tensor:
    return subspace.gram(rows.double())


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of a symmetric matrix, the largest first and none negative, and eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _power(sigma: Tensor, exponent: float) -> Tensor:
    """Return a power of what is not 0; else 0, so that components of nothing are columns of zeros."""
    return torch.where(sigma > 0, torch.where(sigma > 0, sigma, 1) ** exponent, 0)
