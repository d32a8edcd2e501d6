"""Textual-inversion embeddings: new words, as vectors for the tables of text encoders, in every layout that people meet.

`open_embedding` reads one; `EmbeddingLayout.write` (of a layout from `layouts`) makes the tensors of another layout from it.
To add a layout, write a file in ``layouts``: an `EmbeddingLayout` called ``LAYOUT``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.embeddings.layouts import LAYOUTS
from sdformats.errors import FormatError
from sdformats.kind import Looks

if TYPE_CHECKING:
    from sdformats.embeddings.embedding import Embedding
    from sdformats.embeddings.layout import EmbeddingLayout
    from sdformats.tensor import TensorSource


def open_embedding(source: TensorSource) -> tuple[Embedding, EmbeddingLayout]:
    """Read the embedding in an open file, but for its vectors.

    Args:
        source: the file; it must stay open as long as the vectors are read.

    Raises:
        FormatError: it is in no known layout, or broken.
    """
    looks = Looks(source.specs, source.metadata)
    scores = [(layout.score(looks), layout) for layout in LAYOUTS]
    best, layout = max(scores, key=lambda pair: pair[0])
    if best == 0:
        raise FormatError("is no embedding in any known layout", path=source.path)
    found = layout.read(source)
    return replace(found, notes=(*found.notes, *source.notes)), layout


__all__ = ["LAYOUTS", "open_embedding"]
