"""What a run leaves to be looked at: a line of JSON for each step, the loss as a curve, and TensorBoard's files."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

LINES, CURVE = "log.jsonl", "loss.png"
_SMOOTH = 0.02


class Tell(Protocol):
    """How a run speaks to its user."""

    def note(self, text: str) -> None:
        """Say something that was decided."""

    def warn(self, text: str) -> None:
        """Say something that the user should look at."""

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        """Show how far a job is; yields what takes how much was done since, and a few words."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """See `Tell`."""

    def warn(self, text: str) -> None:
        """See `Tell`."""

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        from contextlib import nullcontext

        return nullcontext(lambda _done, _words: None)


class Log:
    """The lines of a run, and what is made from them.

    Args:
        folder: where they are kept.
        step: how many steps are done; lines of later ones, from a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._losses: list[tuple[int, float]] = []
        kept = [line for line in _lines(folder / LINES) if line["step"] <= step] if step else []
        self._losses += [(line["step"], line["loss"]) for line in kept]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        (folder / LINES).write_text(text, encoding="utf-8")
        self._file = (folder / LINES).open("a", encoding="utf-8")
        self._board = _board(folder, step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take down a step."""
        self._losses.append((step, values["loss"]))
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def paint(self) -> None:
        """Write the curve of the loss."""
        if self._losses:
            _curve(self._folder / CURVE, self._losses)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log; a run that was killed may have left half a line at the end."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _board(folder: Path, step: int) -> Any:
    """Return a writer for TensorBoard, which is to forget what it was told of later steps; None where it is not here."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _curve(path: Path, losses: list[tuple[int, float]]) -> None:
    """Paint the losses as dots, and their running mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [step for step, _ in losses]
    share = max(_SMOOTH, 1 / len(losses))
    mean, smooth = losses[0][1], []
    for _, loss in losses:
        mean += share * (loss - mean)
        smooth.append(mean)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, [loss for _, loss in losses], ".", ms=2, color="#9db4d0", label="each step")
    axes.plot(steps, smooth, lw=1.5, color="#1f4e8c", label="running mean")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
