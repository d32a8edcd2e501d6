"""A PNG's pixels: 8 bits, RGB with or without alpha, not interlaced, which is how embeddings are drawn. Others are refused.

Each row is stored as the difference to a prediction from the pixel to the left (a), above (b), and above to the left (c):
none, a, b, (a + b) / 2, or whichever of the three is nearest to a + b - c (PNG specification, section 9).
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.png.chunks import SIGNATURE, inflated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.place import Place
    from sdformats.png.chunks import Chunks

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_HEADER = struct.Struct(">2I5B")
_CHANNELS = {2: 3, 6: 4}
"""Channels by colour type: RGB, RGBA."""
_MAX_BYTES = 64 << 20
"""Bytes of a picture's pixels, packed or not."""
_FILTERS = 5


def read_pixels(chunks: Chunks, place: Place) -> Pixels:
    """Return a picture's pixels, (height, width, 3). Alpha is left out.

    Raises:
        UnsupportedFile: it is stored in a way that embeddings are not.
        CorruptFile: its pixels cannot be decoded.
        UnsafeFile: it is too large.
    """
    width, height, depth, colour, packing, filtering, interlacing = _header(chunks, place)
    if depth != 8 or colour not in _CHANNELS or interlacing:
        raise place.unsupported("is a PNG picture without an embedding in it", "a picture with an embedding")
    if packing or filtering or not width or not height:
        raise place.corrupt("has a malformed PNG header")
    channels = _CHANNELS[colour]
    size = height * (1 + width * channels)
    parts = [chunk for chunk in chunks.all if chunk.kind == b"IDAT"]
    if max(size, sum(part.size for part in parts)) > _MAX_BYTES:
        raise place.unsafe(f"is a picture of {width:,} x {height:,} pixels", f"at most {_MAX_BYTES:,} bytes of them")
    raw = inflated(b"".join(chunks.data(part) for part in parts), size, place, "pixels")
    if len(raw) != size:
        raise place.corrupt(f"has {len(raw):,} bytes of pixels", f"{size:,}")
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * channels)
    if rows[:, 0].max() >= _FILTERS:
        raise place.corrupt("has a row of pixels that is predicted in an unknown way")
    return unfiltered(rows[:, 0], rows[:, 1:].reshape(height, width, channels))[:, :, :3]


def _header(chunks: Chunks, place: Place) -> tuple[int, ...]:
    first = chunks.all[0]
    if first.kind != b"IHDR" or first.size != _HEADER.size:
        raise place.corrupt("has no PNG header", "IHDR as its first chunk")
    return _HEADER.unpack(chunks.data(first))


def unfiltered(filters: Pixels, stored: Pixels) -> Pixels:
    """Return pixels from their differences to the predictions.

    A pixel needs its left, upper and upper left neighbours, so all pixels with one sum of row and column can be computed
    together: row r takes its column t - r in step t.

    Args:
        filters: one for each row, (height,).
        stored: (height, width, channels).
    """
    height, width, channels = stored.shape
    found = np.zeros((height + 1, width + 1, channels), np.int16)  # a row above and a column to the left, of zeros
    for step in range(height + width - 1):
        first, last = max(0, step - width + 1), min(height - 1, step)
        rows = np.arange(first, last + 1)
        columns = step - rows
        left, above, corner = found[rows + 1, columns], found[rows, columns + 1], found[rows, columns]
        choice = filters[rows, None]
        predicted = np.where(choice == 1, left, 0)
        predicted = np.where(choice == 2, above, predicted)
        predicted = np.where(choice == 3, (left + above) >> 1, predicted)
        predicted = np.where(choice == 4, _nearest(left, above, corner), predicted)
        found[rows + 1, columns + 1] = (stored[rows, columns] + predicted) & 0xFF
    return found[1:, 1:].astype(np.uint8)


def _nearest(left: Any, above: Any, corner: Any) -> Any:
    """Return whichever is nearest to left + above - corner; of equals the first."""
    to_left, to_above = abs(above - corner), abs(left - corner)
    to_corner = abs(left + above - 2 * corner)
    other = np.where(to_above <= to_corner, above, corner)
    return np.where((to_left <= to_above) & (to_left <= to_corner), left, other)


def write_picture(pixels: Pixels, texts: Mapping[bytes, bytes]) -> bytes:
    """Return a PNG file.

    Args:
        pixels: (height, width, 3).
        texts: by keyword; they stand in front of the pixels.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)
    rows[:, 0] = 1
    rows[:, 1:] = np.diff(pixels, axis=1, prepend=np.uint8(0)).reshape(height, -1)
    parts = [(b"IHDR", _HEADER.pack(width, height, 8, 2, 0, 0, 0))]
    parts += [(b"tEXt", keyword + b"\0" + text) for keyword, text in texts.items()]
    parts += [(b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in parts
    )
    return SIGNATURE + b"".join(framed)
