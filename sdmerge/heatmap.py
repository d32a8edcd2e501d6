"""A picture of what differs between two models: kinds of layers down, blocks across, colour for the distance.

Each part of the model is a panel of its own. What a tensor is for is told from its name (see `sdmerge.layer_kinds`).
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdformats.output import check_place, write_file
from sdmerge.errors import RequestError
from sdmerge.layer_kinds import KINDS, encoder_layer, kind_of, vae_place
from sdmerge.measure import Measures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdmerge.comparison import Difference, TensorDifference

_TITLES = {
    "unet": "network",
    "te": "text encoder",
    "te1": "text encoder 1",
    "te2": "text encoder 2",
    "te3": "text encoder 3",
    "vae": "VAE",
    "ema": "moving average",
    "other": "other",
}
"""The panels, in order."""
_INK, _SOFT, _PAPER, _SAME, _LINE = "#20222a", "#686c76", "#ffffff", "#d8e6ee", "#dcdde3"
_CELL, _LOW, _NARROW = 0.34, 0.27, 0.17
_WIDEST, _LEFT, _RIGHT, _HEAD, _FOOT, _TITLE, _LABELS, _GAP = 17.0, 1.35, 0.35, 1.35, 0.1, 0.34, 0.82, 0.35
_BAR, _LEAST = 3.8, 10.6
"""Sizes in inches: a cell's width and height, its least width; the widest picture, its margins, …, the colour bar, …"""
_DECADES = 3


@dataclass(frozen=True)
class Cell:
    """What is in one place of a panel.

    Attributes:
        distance: as `Measures.distance`, over the place's tensors.
        otherwise: something differs there that no distance tells: shapes, presence, types that are no
            numbers, whole numbers, NaN and infinity.
    """

    distance: float | None
    otherwise: bool


@dataclass(frozen=True)
class Panel:
    """A part of the model.

    Attributes:
        rows, columns: kinds of layers, and blocks.
        cells: by row and column, counted from 0; where there is none, the model has no tensor.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], Cell]


def check(path: Path, *, overwrite: bool = False, what: str = "heat map") -> None:
    """Refuse a picture that could not be made, before anything is read.

    Args:
        path: where it is to be.
        overwrite: whether a file may be replaced.
        what: what it is called in errors.

    Raises:
        RequestError: the name does not end in ``.png``, or matplotlib is missing.
        OutputExists: there is a file of that name.
        WriteError: there is no such folder.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(f"{path}: the {what} is a PNG picture (expected a name that ends in .png)")
    check_place(path, overwrite=overwrite)
    try:
        import matplotlib.figure as _  # noqa: F401 - only to see whether it is there
    except ImportError as error:
        raise RequestError(
            f"the {what} is drawn by matplotlib, which cannot be imported ({error}); pip install 'sdmerge[demo]'"
        ) from error


def save(found: Difference, path: Path, *, overwrite: bool = False) -> None:
    """Draw a difference into a PNG file, which appears whole or not at all.

    Raises:
        RequestError, WriteError: as `check`, or it cannot be written.
    """
    check(path, overwrite=overwrite)
    write_file(path, _drawn(found), overwrite=overwrite)


def panels(found: Difference) -> tuple[Panel, ...]:
    """Arrange what was found: one panel for each part of the model that has tensors."""
    parts: dict[str, list[TensorDifference]] = {}
    for one in found.tensors:
        parts.setdefault(one.component, []).append(one)
    order = [*(part for part in _TITLES if part in parts), *(part for part in parts if part not in _TITLES)]
    alone = {"te1": "text encoder"} if "te2" not in parts and "te3" not in parts else {}
    return tuple(_panel(alone.get(part, _TITLES.get(part, part)), part, parts[part], found.order) for part in order)


def _panel(title: str, part: str, tensors: Sequence[TensorDifference], order: Sequence[str]) -> Panel:
    rank = {name: i for i, name in enumerate(order)}

    def place(one: TensorDifference) -> tuple[int, str]:
        if part in ("te", "te1", "te2", "te3"):
            return encoder_layer(one.name)
        return vae_place(one.name) if part == "vae" else (rank.get(one.block, len(rank)), one.block)

    groups: dict[tuple[str, str], list[TensorDifference]] = {}
    for one in tensors:
        groups.setdefault((kind_of(one.name), place(one)[1]), []).append(one)
    columns = tuple(dict.fromkeys(label for _, label in sorted({place(one) for one in tensors})))
    rows = tuple(kind for kind in KINDS if any(kind == there for there, _ in groups))
    cells = {(rows.index(kind), columns.index(label)): _cell(group) for (kind, label), group in groups.items()}
    return Panel(title, rows, columns, cells)


def _cell(tensors: Sequence[TensorDifference]) -> Cell:
    measures = Measures.of([one.measures for one in tensors if one.measures is not None])
    unlike = any(one.status not in ("identical", "changed") for one in tensors)
    changed = [one.measures for one in tensors if one.measures is not None and one.status == "changed"]
    silent = any(one.nonfinite or not one.distance for one in changed)
    return Cell(measures.distance, unlike or silent)


def _drawn(found: Difference) -> bytes:
    """Return the picture as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(found)
    scale = _Scale([cell.distance for panel in shown for cell in panel.cells.values()])
    lines, cell, width = _layout(shown)
    heights = [_TITLE + max(len(panel.rows) for panel in line) * _LOW + _LABELS for line in lines]
    height = _HEAD + sum(heights) + _FOOT
    figure = Figure(figsize=(width, height), facecolor=_PAPER, dpi=130)
    FigureCanvasAgg(figure)
    page = _Page(figure, width, height)
    _heading(page, found)
    _legend(page, scale)
    top = _HEAD
    for line, tall in zip(lines, heights, strict=True):
        left = _LEFT
        for panel in line:
            size = len(panel.columns) * cell, len(panel.rows) * _LOW
            _draw(page.axes(left, top + _TITLE, *size), panel, scale, cell)
            left += size[0] + _GAP + _LEFT
        top += tall
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a file may be called anything; a box will do for it
        figure.savefig(data, format="png", facecolor=_PAPER, metadata={"Software": None})
    return data.getvalue()


@dataclass(frozen=True)
class _Page:
    """A matplotlib figure measured in inches from the top left corner."""

    figure: Any
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, parse_math=False, va="center", **style)


def _layout(shown: Sequence[Panel]) -> tuple[list[list[Panel]], float, float]:
    """Return the panels line by line as they fit, a cell's width, and the picture's."""
    most = max((len(panel.columns) for panel in shown), default=1)
    cell = max(_NARROW, min(_CELL, (_WIDEST - _LEFT - _RIGHT) / most))
    room = max(_WIDEST - 1.5, _LEFT + most * cell + _RIGHT)
    lines: list[list[Panel]] = []
    at = width = 0.0
    for panel in shown:
        need = _LEFT + len(panel.columns) * cell + _RIGHT
        if not lines or at + need > room:
            lines.append([])
            at = 0.0
        lines[-1].append(panel)
        at += need
        width = max(width, at)
    return lines, cell, max(width, _LEAST)


class _Scale:
    """Colours for distances, over a few powers of ten below the largest one."""

    def __init__(self, distances: Sequence[float | None]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap, LogNorm

        finite = [one for one in distances if one and math.isfinite(one)]
        self.top = _round_up(max(finite, default=1.0))
        lowest = 1 / _round_up(1 / min(finite, default=self.top))
        self.bottom = max(min(lowest, self.top / 10), self.top / 10**_DECADES)
        self.below = min(finite, default=math.inf) < self.bottom
        self.above = math.inf in distances
        steps = [0.04 + 0.84 * i / 255 for i in range(256)]
        self.colours = LinearSegmentedColormap.from_list("distance", colormaps["magma_r"](steps))
        self.norm = LogNorm(self.bottom, self.top, clip=True)

    def of(self, distance: float | None) -> Any:
        """Return the colour of a cell."""
        return self.colours(self.norm(min(distance, self.top))) if distance else _SAME

    def is_dark(self, distance: float | None) -> bool:
        """Whether light letters are to be read on a cell's colour."""
        return bool(distance) and self.norm(min(distance or 0.0, self.top)) > 0.45


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, … that is no smaller."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10, 20) if power * step * (1 + 1e-9) >= value)


def _heading(page: _Page, found: Difference) -> None:
    total = found.total
    said = f"{total.tensors['changed']:,} of {sum(total.tensors.values()):,} tensors changed"
    distance = total.measures.distance
    if distance is not None and math.isfinite(distance):
        said += f", relative distance {distance:.3g} in all"
    for top, side, name in ((0.36, "A", found.a.name), (0.64, "B", found.b.name)):
        page.text(_GAP, top, side, size=13, weight="bold", color=_SOFT)
        page.text(_GAP + 0.26, top, _short(name), size=13, weight="bold", color=_INK)
    page.text(_GAP, 0.95, f"{found.family or 'unknown family'}: {said}", size=9.5, color=_SOFT)


def _short(name: str) -> str:
    """Make a file's name fit, and harmless."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= 44 else f"{plain[:20]}…{plain[-20:]}"


def _legend(page: _Page, scale: _Scale) -> None:
    """Put the colour bar and the other marks into the upper right corner."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    left = page.width - _RIGHT - _BAR
    page.text(left, 0.25, "relative distance  ‖A - B‖ / ‖A‖", size=8.5, color=_INK)
    axes = page.axes(left, 0.36, _BAR, 0.15)
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[scale.below, scale.above]
    shades = ScalarMappable(scale.norm, scale.colours)
    bar = page.figure.colorbar(shades, cax=axes, orientation="horizontal", extend=extend, extendfrac=0.03)
    bar.set_ticks(LogLocator(subs=(1, 2, 5) if scale.top / scale.bottom < 200 else (1,)), minor=False)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-4 else f"{value:g}"))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7.5, colors=_INK, length=2, pad=2)
    bar.outline.set_visible(False)
    marks = ((_style(Cell(0.0, False), scale), "", "identical"), (_style(None, scale), "", "no such layer"))
    for style, sign, said in (*marks, (_style(Cell(None, True), scale), "≠", "other difference")):
        key = page.axes(left, 0.9, 0.24, 0.18)
        key.axis("off")
        _rectangle(key, 0, 0, style)
        key.set(xlim=(0, 1), ylim=(0, 1))
        key.text(0.5, 0.5, sign, ha="center", va="center", size=8, color=_INK)
        page.text(left + 0.31, 0.99, said, size=8, color=_INK)
        left += 0.5 + 0.075 * len(said)


def _draw(axes: Any, panel: Panel, scale: _Scale, cell: float) -> None:
    rows, columns = len(panel.rows), len(panel.columns)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    for row in range(rows):
        for column in range(columns):
            one = panel.cells.get((row, column))
            _rectangle(axes, column, row, _style(one, scale))
            if one and one.otherwise:
                ink = _PAPER if scale.is_dark(one.distance) else _INK
                axes.text(column + 0.5, row + 0.53, "≠", ha="center", va="center", size=9, color=ink)
    long = max(len(label) for label in panel.columns) > (3 if cell > 0.28 else 2)
    labels = [_short(label) for label in panel.columns]
    small = 7.5 if cell > 0.22 else 6
    axes.set_xticks([i + 0.5 for i in range(columns)], labels, rotation=90 if long else 0, size=small, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(rows)], panel.rows, size=8)
    axes.tick_params(length=0, labelcolor=_INK, pad=3)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(panel.title, loc="left", size=10.5, weight="bold", color=_INK, pad=5)


def _rectangle(axes: Any, column: int, row: int, style: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column, row), 1, 1, linewidth=0.7, clip_on=False, **style))


def _style(one: Cell | None, scale: _Scale) -> dict[str, Any]:
    if one is None:
        return {"facecolor": _PAPER, "edgecolor": _LINE, "hatch": "////"}
    if one.otherwise and not one.distance:
        return {"facecolor": _PAPER, "edgecolor": _LINE}
    return {"facecolor": scale.of(one.distance), "edgecolor": _PAPER}
