"""Sizes that pictures are brought to, and the order in which batches of one size are seen.

Both follow from the settings alone: nothing needs to be stored for a run to go on where it stopped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Size = tuple[int, int]

_MOST_STRETCHED = 4


def sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Return widths and heights in multiples of `step` that fill the area of a square of `resolution` as well as they can."""
    if resolution < step:
        return ((resolution, resolution),)
    area = resolution * resolution
    found: set[Size] = set()
    for width in range(step, resolution * 2 + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= _MOST_STRETCHED * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def size_for(picture: Size, choices: Sequence[Size]) -> Size:
    """Return the choice whose aspect ratio is nearest; of equals the one with the larger area."""
    ratio = math.log(picture[0] / picture[1])
    return min(choices, key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 9), -size[0] * size[1], size))


class Order:
    """Which pictures make the n-th batch.

    A round shows every picture as often as its repeats say. Pictures of one size make batches; where they do not divide, the
    last batch of that size is filled with others of it.

    Args:
        groups: for each size, the indices of its pictures, repeats included.
        batch: how many pictures a batch has, on all devices together.
        seed: decides about the order.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch: int, seed: int) -> None:
        self._groups, self._batch, self._seed = [list(group) for group in groups], batch, seed
        self.round = sum(-(-len(group) // batch) for group in self._groups)
        """How many batches make a round."""
        self._turn, self._batches = -1, list[tuple[int, ...]]()

    def __call__(self, number: int) -> tuple[int, ...]:
        """Return the pictures of a batch, by its number from the run's beginning."""
        turn, place = divmod(number, self.round)
        if self._turn != turn:
            self._batches, self._turn = self._shuffled(turn), turn
        return self._batches[place]

    def _shuffled(self, turn: int) -> list[tuple[int, ...]]:
        source = draws(self._seed, turn)
        batches = []
        for group in self._groups:
            mine: list[int] = []
            whole = -(-len(group) // self._batch) * self._batch
            while len(mine) < whole:
                mine += [group[i] for i in torch.randperm(len(group), generator=source).tolist()]
            batches += [tuple(mine[i : i + self._batch]) for i in range(0, whole, self._batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=source).tolist()]


def mixed(*numbers: int) -> int:
    """Return a seed that differs in all bits for different numbers (splitmix64 over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (1 << 64) - 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        state ^= state >> 31
    return state >> 1


def draws(*numbers: int) -> torch.Generator:
    """Return a source of random numbers that depends on `numbers` alone."""
    return torch.Generator().manual_seed(mixed(*numbers))


def permuted(parts: Sequence[str], kept: int, source: torch.Generator) -> list[str]:
    """Return texts in random order, but for the first `kept`."""
    moved: Tensor = torch.randperm(max(0, len(parts) - kept), generator=source)
    return [*parts[:kept], *(parts[kept + i] for i in moved.tolist())]
