"""Pictures with embeddings in them, made and read without the code under test: PIL, and the strips' rule written out."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def as_json(vectors: np.ndarray[Any, Any], **texts: Any) -> bytes:
    """Return what A1111 puts into a picture."""
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, **texts}
    return json.dumps(tree).encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_text(text: bytes, kind: bytes = b"tEXt") -> bytes:
    """Return a small picture with a text chunk of any kind."""
    body = {
        b"tEXt": text,
        b"zTXt": b"\0" + zlib.compress(text),
        b"iTXt": b"\1\0\0\0" + zlib.compress(text),
        b"iTXt plain": b"\0\0en\0word\0" + text,
    }[kind]
    return with_chunks(chunk(kind[:4], b"sd-ti-embedding\0" + body))


def with_chunks(*extra: bytes) -> bytes:
    """Return a picture of one pixel with chunks before its pixels."""
    header = struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0\1\2\3"))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(extra) + pixels + chunk(b"IEND", b"")


def base64_of(tree: Any) -> bytes:
    return base64.b64encode(tree if isinstance(tree, bytes) else json.dumps(tree).encode())


def saved(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    """Return what PIL makes of pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def noise(count: int) -> list[int]:
    def numbers() -> Iterator[int]:
        state = 0
        while True:
            state = (1664525 * state + 1013904223) % 2**32
            yield state % 255

    source = numbers()
    return [next(source) & 15 for _ in range(count)]


def with_strips(picture: np.ndarray[Any, Any], packed: bytes) -> np.ndarray[Any, Any]:
    """Draw packed bytes as A1111 does: whole columns of pixels, and always some more than are needed."""
    height = len(picture)
    padded = packed + packed * 9
    count = 3 * height * (len(packed) // (3 * height) + 2)
    values = (padded * (count // len(padded) + 1))[:count]
    random = noise(count)
    low = [(value & 15) ^ mask | 0x40 for value, mask in zip(values, random, strict=True)]
    high = [(value >> 4) ^ mask | 0x80 for value, mask in zip(values, random, strict=True)]
    strips = [np.array(half, np.uint8).reshape(height, -1, 3) for half in (low, high)]
    black = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([strips[0], black, picture, black, strips[1]], axis=1)


def strips_of(pixels: np.ndarray[Any, Any]) -> bytes:
    """Read strips back, from a picture without black borders."""
    low = pixels & 15
    dark = [x for x in range(low.shape[1]) if not low[:, x].any()]
    left, right = low[:, : dark[0]].reshape(-1).tolist(), low[:, dark[-1] + 1 :].reshape(-1).tolist()
    random = noise(len(left))
    data = bytes((h ^ m) << 4 | (lo ^ m) for lo, h, m in zip(left, right, random, strict=True))
    return zlib.decompressobj().decompress(data)
