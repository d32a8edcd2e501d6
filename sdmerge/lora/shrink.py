"""Best approximations of many modules at once: ranks chosen, factors made, on several threads."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a module's LoRA is like, whatever its numbers.

    Attributes:
        rows: m.
        inner: the shape of a row: (in,), or (in, kh, kw).
        dtype: of the factors in the output.
        bias: stays.
        reshape: stays.
    """

    rows: int
    inner: tuple[int, ...]
    dtype: DType
    bias: Ref | None = None
    reshape: tuple[int, ...] | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n)."""
        return self.rows, math.prod(self.inner)

    def lora(self, rank: int, up: torch.Tensor, down: torch.Tensor) -> LoRA:
        """Return the record of factors in memory."""
        tail = (1,) * (len(self.inner) - 1)
        return LoRA(
            up=Held(up, Spec((self.rows, rank, *tail), self.dtype)),
            down=Held(down, Spec((rank, *self.inner), self.dtype)),
            alpha=float(rank),
            bias=self.bias,
            reshape=self.reshape,
        )


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
        return self.before * sum(self.sides) * self.dtype.bits // 8


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
        in_threads(names, lambda: do, threads=options.threads, name="sdmerge", progress=advance)


def fitting(
    spectra: Mapping[str, torch.Tensor], forms: Mapping[str, Form], size: int, size_of: SizeOf
) -> dict[str, int]:
    """Return ranks whose whole file is no larger than `size`: names and what is fused take their part of it.

    Raises:
        RequestError: the size is too small for anything.
    """
    shapes = {path: forms[path].sides for path in spectra}
    widths = {path: forms[path].dtype.bits // 8 for path in spectra}
    room = size
    while room > 0:
        ranks = budget.by_bytes(spectra, shapes, widths, room)
        over = size_of(_placeholders(forms, ranks)) - size
        if over <= 0 and any(ranks.values()):
            return ranks
        room -= max(over, 1)
    raise RequestError(f"size is {size:,} bytes, in which no module has a place (give a larger one)")


def _placeholders(forms: Mapping[str, Form], ranks: Mapping[str, int]) -> dict[str, LoRA]:
    """Return records of the right shapes that take no memory, no two of them equal where they may be fused."""
    found = {}
    for i, (path, rank) in enumerate(ranks.items()):
        if rank:
            rows, columns = forms[path].sides
            filler = torch.tensor(float(i % 199 + 1))
            found[path] = forms[path].lora(rank, filler.expand(rows, rank), filler.expand(rank, columns))
    return found
