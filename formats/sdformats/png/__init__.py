"""Embeddings that travel inside PNG pictures, as A1111's web UI writes them.

::

    text      a chunk named "sd-ti-embedding": base64 of JSON
    pixels    strips of noise to the left and right of the picture: the low four bits of their pixels are JSON, packed by zlib

The JSON is what the embedding's ``.pt`` would hold; a tensor is ``{"TORCHTENSOR": [[…]]}``. Numbers are written with all of
float64's digits, so that float32 comes back bit by bit. Where both ways are in a picture, the text is read.
"""

from sdformats.png.sink import PngSink
from sdformats.png.source import SIGNATURE, PngSource

__all__ = ["SIGNATURE", "PngSink", "PngSource"]
