"""Sheets of pictures with labels, and PNG files of them."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

from sdformats.output import write_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_GAP, _TOP, _TITLE = 10, 84, 52
_SMALL, _LARGE = 15, 24
_SMALLEST, _LARGEST = 192, 512
_INK, _SOFT, _PAPER, _MARK = (32, 34, 40), (104, 108, 118), (255, 255, 255), (255, 243, 214)
_LETTER = 8
"""How wide a letter of a column's heading is, in pixels, roughly."""


def sheet(
    title: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    pictures: Sequence[Sequence[Image]],
    *,
    marked: bool = False,
) -> Image:
    """Arrange pictures in rows and columns. Small ones are enlarged, large ones reduced.

    Args:
        title: stands above; may be empty.
        rows: for each a name, and a few words below it.
        columns: for each a heading.
        pictures: for each row one for each column.
        marked: whether the last row stands out.
    """
    from PIL import Image, ImageDraw

    first = pictures[0][0]
    scale = min(1.0 if first.width >= _SMALLEST else _SMALLEST / first.width, _LARGEST / max(first.size))
    wide, high = (round(side * scale) for side in first.size)
    left = round(max(max(_length(name, _LARGE), _length(what, _SMALL)) for name, what in rows)) + _GAP
    left = left + 2 * _GAP if left > _GAP else left
    above = _TITLE if title else _GAP
    top = above + (_TOP if any(columns) else 0)
    size = (left + (wide + _GAP) * len(columns), top + (high + _GAP) * len(rows) + _GAP)
    made = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(made)
    _text(pen, (_GAP * 2, 14), title, _LARGE, _INK)
    if marked:
        pen.rectangle((0, top + (high + _GAP) * (len(rows) - 1) - _GAP // 2, *size), fill=_MARK)
    for i, heading in enumerate(columns):
        lines = textwrap.wrap(heading, max(8, wide // _LETTER))
        lines = lines if len(lines) <= 4 else [*lines[:3], f"{lines[3]} …"]
        _text(pen, (left + i * (wide + _GAP), above + 6), "\n".join(lines), _SMALL, _INK)
    for j, ((name, what), images) in enumerate(zip(rows, pictures, strict=True)):
        y = top + j * (high + _GAP)
        _text(pen, (_GAP * 2, y + high * 3 // 10), name, _LARGE, _INK)
        _text(pen, (_GAP * 2, y + high * 3 // 10 + 36), what, _SMALL, _SOFT)
        for i, image in enumerate(images):
            shown = image if scale == 1 else image.resize((wide, high), Image.Resampling.BICUBIC)
            made.paste(shown, (left + i * (wide + _GAP), y))
    return made


def save(picture: Image, path: Path, *, overwrite: bool = False) -> None:
    """Write a picture as PNG, which appears whole or not at all.

    Raises:
        sdformats.errors.OutputExists, sdformats.errors.WriteError: it cannot be written.
    """
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    write_file(path, data.getvalue(), overwrite=overwrite)


def _length(text: str, size: int) -> float:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    return max((float(font.getlength(line)) for line in text.splitlines()), default=0.0)


def _text(pen: ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int]) -> None:
    from PIL import ImageFont

    pen.multiline_text(place, text, fill=ink, font=ImageFont.load_default(size), spacing=5)
