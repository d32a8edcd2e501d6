"""What a GPU does side by side: copying in, computing, copying out, each in an order of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Mark(Protocol):
    """A moment in a lane."""

    def wait(self) -> None:
        """Wait until the lane is there."""


class Lane(Protocol):
    """Work that is done in its order, beside what the host and other lanes do."""

    def do(self, work: Callable[[], None]) -> None:
        """Hand over some work: calls of torch that do not wait for the device."""

    def mark(self) -> Mark:
        """Return the moment when all work so far is done."""

    def after(self, mark: Mark) -> None:
        """Let what is handed over from now on wait for a moment in another lane."""


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class _Stream:
    """A CUDA stream: work is started at once, and runs when its turn comes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def do(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        return _Event(self._stream)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _Event), "a moment of this device"
        self._stream.wait_event(mark.event)


@dataclass(frozen=True)
class Lanes:
    """A device, as one thread uses it.

    Attributes:
        inward, compute, outward: its lanes.
        staging: returns memory of the host, in bytes, from and to which the device copies by itself.
        release: gives memory back that is held for later.
    """

    device: torch.device
    inward: Lane
    compute: Lane
    outward: Lane
    staging: Callable[[int], Tensor]
    release: Callable[[], None]


def cuda(device: torch.device) -> Lanes:
    """Return the lanes of a GPU: three streams, and pinned memory."""
    return Lanes(device, _Stream(device), _Stream(device), _Stream(device), _pinned, torch.cuda.empty_cache)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
