"""The picture beside which an embedding is put into a PNG: the user's own, or one of the vectors' values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.views import floats
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.embeddings.embedding import Embedding
    from sdformats.png.pixels import Pixels

_SIZE = 512
_BORDER, _TITLE = 24, 72
_COLUMNS = 96
"""Values in a row of the picture: 768 of them are eight rows."""
_LARGEST = 2048
"""Pixels along the longer edge of a picture."""
_LOW, _MIDDLE, _HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_GROUND, _INK = (24, 24, 28), (235, 235, 235)
_LONGEST = 40


def picture_for(embedding: Embedding, preview: Path | None) -> Pixels:
    """Return a picture, (height, width, 3).

    Args:
        embedding: what it is for.
        preview: the user's picture; None: one is painted.

    Raises:
        RequestError: Pillow is not there, or the picture cannot be read.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RequestError("writing PNGs needs Pillow: pip install 'sdmerge[png]'") from None
    if preview is None:
        return _painted(embedding)
    try:
        with Image.open(preview) as opened:
            opened.thumbnail((_LARGEST, _LARGEST))
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        raise RequestError(f"{preview}: cannot be read as a picture ({error})") from error


def _painted(embedding: Embedding) -> Pixels:
    """Paint every value as a square, blue below zero and red above, the first text encoder's vectors one below another."""
    from PIL import Image, ImageDraw, ImageFont

    inner = _SIZE - 2 * _BORDER
    height = _SIZE - 2 * _TITLE
    ref = next(iter(embedding.words[0].vectors.values()))
    canvas = Image.new("RGB", (_SIZE, _SIZE), _GROUND)
    tiles = Image.fromarray(_colours(floats(ref)))
    canvas.paste(tiles.resize((inner, height), Image.Resampling.NEAREST), (_BORDER, _TITLE))
    pen = ImageDraw.Draw(canvas)
    vectors = f"{ref.shape[0]} vector{'s' if ref.shape[0] > 1 else ''}"
    steps = "" if embedding.step is None else f", {embedding.step} steps"
    lines = (
        (f"<{_short(embedding.name or embedding.words[0].token or '?')}>", _BORDER, 32),
        (f"{embedding.family or 'unknown family'}: {vectors}{steps}", _SIZE - _TITLE + 16, 20),
        (_short(embedding.checkpoint or ""), _SIZE - _TITLE + 42, 16),
    )
    for text, top, size in lines:
        pen.text((_BORDER, top), text, fill=_INK, font=ImageFont.load_default(size))
    return np.asarray(canvas)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _colours(values: np.ndarray[Any, Any]) -> Pixels:
    """Return a colour for every value, a block of rows for each vector."""
    wide = np.nan_to_num(values.astype(np.float64))
    spread = 3 * wide.std() or 1.0
    place = np.clip(wide / spread, -1, 1)
    rows = -(-place.shape[1] // _COLUMNS)
    padded = np.zeros((len(place), rows * _COLUMNS))
    padded[:, : place.shape[1]] = place
    share = padded.reshape(-1, _COLUMNS)[:, :, None]
    middle = np.array(_MIDDLE)
    below, above = np.array(_LOW) - middle, np.array(_HIGH) - middle
    return np.asarray(np.rint(middle + np.where(share < 0, -share * below, share * above)), np.uint8)
