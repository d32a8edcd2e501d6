"""A pretended GPU: whatever is handed over runs as late as it may, on the CPU."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdmerge import gpu, lanes, run, worker

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

CPU = torch.device("cpu")


@dataclass
class Late:
    """A lane that does nothing before someone waits for it: who forgets to wait gets what was there before."""

    todo: deque[Callable[[], None]] = field(default_factory=deque)
    given: int = 0

    def do(self, work: Callable[[], None]) -> None:
        self.todo.append(work)
        self.given += 1

    def mark(self) -> Moment:
        return Moment(self, self.given)

    def after(self, mark: lanes.Mark) -> None:
        self.do(mark.wait)


@dataclass
class Moment:
    lane: Late
    number: int

    def wait(self) -> None:
        while self.lane.given - len(self.lane.todo) < self.number:
            self.lane.todo.popleft()()


class Soon(Late):
    """A lane that does everything at once, as a GPU that is never busy."""

    def do(self, work: Callable[[], None]) -> None:
        self.given += 1
        work()


@dataclass
class Pretended:
    """What was asked of the pretended GPU."""

    lane: type[Late] = Late
    released: int = 0
    staged: list[int] = field(default_factory=list)

    def lanes(self, _device: torch.device) -> lanes.Lanes:
        return lanes.Lanes(CPU, self.lane(), self.lane(), self.lane(), self._staging, self._release)

    def _staging(self, nbytes: int) -> Tensor:
        self.staged.append(nbytes)
        return torch.full((nbytes,), 0x7F, dtype=torch.uint8)  # NaN, where it is taken for numbers too early

    def _release(self) -> None:
        self.released += 1


def pretend(monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> Pretended:
    """Let ``device="cuda"`` (or every device) be a pretended GPU, with small blocks."""
    found = Pretended()
    on_cpu = run.pick_device
    monkeypatch.setattr(
        run, "pick_device", lambda o, p=(): torch.device("cuda") if always or o.device == "cuda" else on_cpu(o, p)
    )
    monkeypatch.setattr(lanes, "cuda", found.lanes)
    for module, name, value in (
        (worker, "BLOCK", 64), (worker, "SUM_BLOCK", 32),
        (gpu, "BLOCK", 128), (gpu, "BATCH", 2000), (gpu, "_PIECE", 96), (gpu, "_SMALLEST", 16),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return found
