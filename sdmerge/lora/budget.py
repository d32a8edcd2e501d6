"""How many components each module keeps: pure functions of the singular values, in descending order, by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    Spectra = Mapping[str, Tensor]
    Ranks = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What bounds the ranks: one of these.

    Attributes:
        rank: of every module.
        size: bytes of the whole file.
        energy: the share of each module's squared singular values that is kept, 0 to 1.
        error: the largest ‖Δ − Δ'‖ / ‖Δ‖ of each module, 0 to 1.

    Raises:
        RequestError: several are given, or one is out of range.
    """

    rank: int | None = None
    size: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "size", "energy", "error") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} exclude each other; give one of them")
        for name in ("rank", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value} (expected 1 or more)")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError(f"energy is {self.energy:g} (expected more than 0, up to 1)")
        if self.error is not None and not 0 <= self.error < 1:
            raise RequestError(f"error is {self.error:g} (expected 0 or more, below 1)")

    @property
    def given(self) -> dict[str, int | float]:
        """The one that is given, by its name; empty where there is none."""
        named = {"rank": self.rank, "size": self.size, "energy": self.energy, "error": self.error}
        return {name: value for name, value in named.items() if value is not None}

    def ranks(self, spectra: Spectra) -> Ranks:
        """Return the ranks, but for a size, which needs to know the shapes: see `by_bytes`."""
        if self.energy is not None:
            return by_energy(spectra, self.energy)
        if self.error is not None:
            return by_error(spectra, self.error)
        assert self.rank is not None, "asked for with a limit"
        return fixed(spectra, self.rank)


def fixed(spectra: Spectra, rank: int) -> Ranks:
    """Return `rank` for every module, or as many components as it has."""
    return {path: min(rank, sigma.numel()) for path, sigma in spectra.items()}


def by_energy(spectra: Spectra, share: float) -> Ranks:
    """Return for each module the smallest rank, at least 1, that keeps `share` of Σ σ²."""
    return {path: _reaching(sigma, share) for path, sigma in spectra.items()}


def by_error(spectra: Spectra, error: float) -> Ranks:
    """Return for each module the smallest rank, at least 1, whose relative error √(Σ dropped σ² / Σ σ²) is `error` at most."""
    found = {}
    for path, sigma in spectra.items():
        squares = sigma.double().square()
        # Summed from the small end: a tail of 1e-12 of the whole would be lost in a difference of large sums.
        tails = squares.flip(0).cumsum(0).flip(0)
        allowed = error**2 * squares.sum()
        found[path] = max(1, int((tails > allowed).sum()))
    return found


def _reaching(sigma: Tensor, share: float) -> int:
    squares = sigma.double().square()
    if share >= 1:
        return max(1, int((squares > 0).sum()))
    sums = squares.cumsum(0)
    return max(1, min(sigma.numel(), int((sums < share * sums[-1]).sum()) + 1))


def by_bytes(spectra: Spectra, costs: Mapping[str, Tensor], nbytes: int) -> Ranks:
    """Return ranks whose factors take `nbytes` at most, with the least error in all: the best to within one component.

    Components are kept in descending order of σ² / cost, the error that a byte saves, until the next one does not fit. Those
    of a module come in their order: where a later one is worth more than one before it, it counts for as little as that, and
    what is found need not be the best. A rank may be 0. Components of σ = 0 are never kept.

    Args:
        spectra: singular values, or roots of what each further component adds to the squared norm.
        costs: bytes that each component adds, as many as there are singular values.
        nbytes: of all factors together.
    """
    paths = tuple(spectra)
    if not paths:
        return {}
    counts = torch.tensor([spectra[path].numel() for path in paths])
    owner = torch.repeat_interleave(torch.arange(len(paths)), counts)
    cost = torch.cat([costs[path] for path in paths])
    squares = torch.cat([spectra[path].double().square() for path in paths])
    worth = torch.cat([(spectra[path].double().square() / costs[path]).cummin(0).values for path in paths])
    order = torch.sort(worth, descending=True, stable=True).indices
    order = order[squares[order] > 0]
    kept = int((cost[order].cumsum(0) <= nbytes).sum())
    ranks = torch.bincount(owner[order[:kept]], minlength=len(paths))
    return {path: int(rank) for path, rank in zip(paths, ranks, strict=True)}
