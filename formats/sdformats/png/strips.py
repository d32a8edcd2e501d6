"""Data in the pixels of a picture.

::

    [low strip][1 black column][the picture][1 black column][high strip]

The data are packed by zlib. The low four bits of each byte are the low four bits of the values (three to a pixel) in the left
strip, the high four bits those in the right strip, row by row; what is too much in a strip repeats the beginning. Both are
XORed with the low four bits of random numbers (a linear congruential generator, x ← 1664525 x + 1013904223 mod 2³², of which
x mod 255 is taken, starting with x = 0). The high four bits of the strips' values are decoration.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.png.chunks import inflated
from sdformats.png.tensors import MAX_JSON

if TYPE_CHECKING:
    from sdformats.place import Place
    from sdformats.png.pixels import Pixels

_LOW = 0x0F
_FACTOR, _TERM = 1664525, 1013904223
_BLOCK = 1 << 12


def read_strips(pixels: Pixels, place: Place) -> bytes | None:
    """Return the data in a picture's strips; None where it has none.

    Args:
        pixels: (height, width, 3).
        place: for errors.

    Raises:
        CorruptFile: there are strips, and what is in them cannot be unpacked.
        UnsafeFile: it grows to more than `MAX_JSON` bytes.
    """
    low = _cropped(pixels) & _LOW
    black = np.flatnonzero(low.max(axis=(0, 2), initial=0) == 0)
    if len(black) < 2:
        return None
    left, right = low[:, : black[0]], low[:, black[-1] + 1 :]
    if left.shape != right.shape or not left.size:
        return None
    noise = _noise(left.size).reshape(left.shape)
    data = ((right ^ noise) << 4 | left ^ noise).tobytes()
    if data[0] & _LOW != 8 or int.from_bytes(data[:2], "big") % 31:  # no zlib stream begins like this
        return None
    return inflated(data, MAX_JSON, place, "strips", padded=True)


def with_strips(picture: Pixels, data: bytes) -> Pixels:
    """Return a picture with strips that hold some data.

    Args:
        picture: (height, width, 3).
        data: what to put in.
    """
    packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
    height = len(picture)
    width = -(-len(packed) // (3 * height))
    values = np.resize(packed, (height, width, 3))
    noise = _noise(values.size).reshape(values.shape)
    edge = np.zeros((height, 1, 3), np.uint8)
    strips = [_decorated((half ^ noise).astype(np.uint8)) for half in (values & _LOW, values >> 4)]
    return np.concatenate((strips[0], edge, picture, edge, strips[1]), axis=1)


def _decorated(strip: Pixels) -> Pixels:
    """Put a grey pattern of stripes into the high bits, nowhere black: black borders would be cut off in reading."""
    rows, columns = np.indices(strip.shape[:2])
    shade = 0x20 + 0x10 * ((rows + columns) // 8 % 4)
    return np.asarray(strip | shade[:, :, None], np.uint8)


def _cropped(pixels: Pixels) -> Pixels:
    """Cut off the rows and columns at the borders in which no pixel has all of red, green and blue."""
    lit = pixels.min(axis=2)
    rows, columns = np.flatnonzero(lit.max(axis=1, initial=0)), np.flatnonzero(lit.max(axis=0, initial=0))
    if not len(rows):
        return pixels[:0, :0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _block() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return what takes x to the next numbers: x_k = factors[k] x + terms[k] mod 2³², from k = 1 on."""
    factors, terms = [], []
    factor, term = 1, 0
    for _ in range(_BLOCK):
        factor, term = factor * _FACTOR % (1 << 32), (term * _FACTOR + _TERM) % (1 << 32)
        factors.append(factor)
        terms.append(term)
    return np.array(factors, np.uint64), np.array(terms, np.uint64)


def _noise(count: int) -> Pixels:
    """Return the low four bits of the first `count` random numbers."""
    factors, terms = _block()
    found = np.empty(-(-count // _BLOCK) * _BLOCK, np.uint8)
    state = np.uint64(0)
    for start in range(0, len(found), _BLOCK):
        states = (factors * state + terms) & np.uint64(0xFFFFFFFF)
        found[start : start + _BLOCK] = (states % np.uint64(255)) & np.uint64(_LOW)
        state = states[-1]
    return found[:count]
