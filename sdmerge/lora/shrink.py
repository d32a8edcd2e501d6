"""Best approximations of many modules at once: ranks chosen, factors made, on several threads."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sdformats.adapters.records import LoRA
from sdformats.tensor import Spec
from sdmerge.errors import RequestError
from sdmerge.execute import shown
from sdmerge.lora import budget
from sdmerge.lora.held import Held
from sdmerge.team import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.tensor import DType
    from sdformats.views import Ref
    from sdmerge.lora.budget import Limit
    from sdmerge.lora.factors import Spectrum
    from sdmerge.options import Options

    SizeOf = Callable[[Mapping[str, LoRA]], int]

_FINE = 1000
"""A size is filled but for this part of it, or less than what a component takes."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a module's LoRA is like, whatever its numbers.

    Attributes:
        rows: m.
        inner: the shape of a row: (in,), or (in, kh, kw).
        dtype: of the factors in the output.
        tucker: whether there is a core between the factors, (rank, rank, kh, kw), and the second is (rank, in, 1, 1).
        bias: stays.
        reshape: stays.
    """

    rows: int
    inner: tuple[int, ...]
    dtype: DType
    tucker: bool = False
    bias: Ref | None = None
    reshape: tuple[int, ...] | None = None

    def costs(self, count: int) -> torch.Tensor:
        """Return the bytes that each of the first `count` components adds."""
        kernel = math.prod(self.inner[1:])
        core = (2 * torch.arange(count) + 1) * kernel if self.tucker else torch.zeros(count, dtype=torch.int64)
        return (self.rows + (self.inner[0] if self.tucker else self.inner[0] * kernel) + core) * self.dtype.itemsize

    def nbytes(self, rank: int) -> int:
        """Return the bytes of all factors at a rank."""
        return int(self.costs(rank).sum())

    def lora(self, rank: int, up: torch.Tensor, down: torch.Tensor, mid: torch.Tensor | None = None) -> LoRA:
        """Return the record of factors in memory; they may be flattened."""
        tail = (1,) * (len(self.inner) - 1)
        inner = (self.inner[0], *tail) if self.tucker else self.inner
        core = None if mid is None else Held(mid, Spec((rank, rank, *self.inner[1:]), self.dtype))
        return LoRA(
            up=Held(up, Spec((self.rows, rank, *tail), self.dtype)),
            down=Held(down, Spec((rank, *inner), self.dtype)),
            mid=core,
            alpha=float(rank),
            bias=self.bias,
            reshape=self.reshape,
        )

    def placeholder(self, rank: int, number: int) -> LoRA:
        """Return a record of the right shapes that takes no memory; another number makes it another."""
        filler = torch.tensor(float(number))
        made = self.lora(rank, filler, filler, filler if self.tucker else None)
        up, down = (Held(filler.expand(ref.shape), ref.spec) for ref in (made.up, made.down))
        mid = None if made.mid is None else Held(filler.expand(made.mid.shape), made.mid.spec)
        return replace(made, up=up, down=down, mid=mid)


@dataclass(frozen=True, kw_only=True)
class Piece(Form):
    """A module to be approximated.

    Attributes:
        load: reads and decomposes it.
        before: its rank.
    """

    load: Callable[[], Spectrum]
    before: int

    @property
    def cost(self) -> int:
        """Bytes of its factors."""
        return self.nbytes(self.before)


@dataclass(frozen=True)
class Shrunk:
    """What became of a module.

    Attributes:
        record: its best approximation; None where nothing of it was kept.
        before, rank: its rank, and the new one.
        norm, lost: ‖Δ‖, and ‖Δ - Δ'‖.
    """

    record: LoRA | None
    before: int
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """The relative error."""
        return self.lost / self.norm if self.norm else 0.0


def shrink(
    pieces: Mapping[str, Piece], limit: Limit, options: Options, size_of: SizeOf, label: str
) -> dict[str, Shrunk]:
    """Approximate modules. The same result for any number of threads.

    Args:
        size_of: returns the bytes of the whole output, were these its LoRAs.

    Raises:
        RequestError: the size is too small for anything.
        sdmerge.errors.SdmergeError, sdformats.errors.FormatError: as loading does.
    """
    ranks: Mapping[str, int] | None = None
    if limit.size is not None:
        spectra: dict[str, torch.Tensor] = {}
        _each(pieces, lambda path, piece: spectra.update({path: piece.load().sigma}), options, "looking")
        ranks = fitting({path: spectra[path] for path in pieces}, pieces, limit.size, size_of)
    found: dict[str, Shrunk] = {}

    def one(path: str, piece: Piece) -> None:
        if ranks is not None and not ranks[path]:
            found[path] = _nothing(piece, spectra[path])
            return
        spectrum = piece.load()
        rank = ranks[path] if ranks is not None else limit.ranks({path: spectrum.sigma})[path]
        squares = spectrum.sigma.square()
        found[path] = Shrunk(
            piece.lora(rank, *spectrum.truncated(rank)),
            piece.before,
            rank,
            float(squares.sum().sqrt()),
            float(squares[rank:].sum().sqrt()),
        )

    _each(pieces, one, options, label)
    return {path: found[path] for path in pieces}


def _nothing(piece: Piece, sigma: torch.Tensor) -> Shrunk:
    norm = float(sigma.norm())
    return Shrunk(None, piece.before, 0, norm, norm)


def _each(pieces: Mapping[str, Piece], work: Callable[[str, Piece], None], options: Options, label: str) -> None:
    costs = {path: piece.cost for path, piece in pieces.items()}
    each(costs, lambda path: work(path, pieces[path]), options, label)


def each(costs: Mapping[str, int], work: Callable[[str], None], options: Options, label: str) -> None:
    """Do something with every module, in this order, on several threads.

    Args:
        costs: the bytes that progress counts for each.
        work: called with a module's path.
    """

    def do(path: str) -> int:
        work(path)
        return costs[path]

    with shown(options, label, sum(costs.values())) as advance:
        names = ((path,) for path in costs)
        in_threads(names, lambda: nullcontext(do), threads=options.threads, name="sdmerge", progress=advance)


def fitting(
    spectra: Mapping[str, torch.Tensor], forms: Mapping[str, Form], size: int, size_of: SizeOf
) -> dict[str, int]:
    """Return ranks whose whole file is no larger than `size`: names and what is fused take their part of it.

    Raises:
        RequestError: the size is too small for anything, or there is nothing.
    """
    if not any(bool(sigma.any()) for sigma in spectra.values()):
        raise RequestError("all changes are zeros, of which no size keeps anything (give a rank)")
    costs = {path: forms[path].costs(spectra[path].numel()) for path in spectra}
    found: dict[str, int] | None = None
    low, high, room = 0, size + 1, size  # bytes of factors that fit, that do not, and that are tried
    while high - low > 1 + size // _FINE:
        ranks = budget.by_bytes(spectra, costs, room)
        # No two placeholders are equal where they may be fused.
        kept = {
            path: forms[path].placeholder(rank, i % 199 + 1) for i, (path, rank) in enumerate(ranks.items()) if rank
        }
        over = size_of(kept) - size
        if over <= 0:
            found, low = (ranks if kept else None), room
        else:
            high = room
        room -= over
        if not low < room < high:
            room = (low + high) // 2
    if found is None:
        raise RequestError(f"size is {size:,} bytes, in which no module has a place (give a larger one)")
    return found
