"""Runs of training on the tiny models, for the tests of every method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdmerge.train import settings as groups
from sdmerge.train.log import Silent
from sdmerge.train.loop import Run
from sdmerge.train.method import find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor

    from sdmerge.train.networks import Networks


TEXTS = ("a large red heart", "a small sks diamond, navy background", "")


class Heard(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        return super().progress(label, total)


def new(method: str, model: Path, data: Path, output: Path, **values: Any) -> Run:
    """Return a run that has not begun. Tests train in one thread: what they measure must not depend on the machine."""
    torch.set_num_threads(1)
    found = find(method)
    given = {"model": str(model), "data": str(data), "output": str(output), "device": "cpu", "batch": 4} | values
    groups.check_names(given, {**groups.GROUPS, "method": found})
    made = {name: groups.made(cls, given, found.defaults) for name, cls in groups.GROUPS.items()}
    return Run(groups.made(found, given), groups.Settings(**made), Heard())


def trained(method: str, model: Path, data: Path, output: Path, **values: Any) -> Run:
    """Return a run that was carried out."""
    run = new(method, model, data, output, **values)
    run.go()
    return run


@torch.no_grad()
def painted(networks: Networks, seed: int = 5, texts: Sequence[str] = TEXTS) -> Tensor:
    """Return what the UNet predicts for some noise and some texts: where two models agree here, they are the same."""
    networks.unet.eval()
    source = torch.Generator().manual_seed(seed)
    noisy = torch.randn(3, 4, 8, 8, generator=source)
    told = networks.read(texts)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, 6)
    return networks.predict(noisy, torch.tensor([20, 400, 900]), told, sizes)
