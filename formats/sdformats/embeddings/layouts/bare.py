"""A tensor without a name. One vector may just as well be an aesthetic embedding: see `sdformats.kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import header, one, vectors_only

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource

_WIDTHS = {768, 1024, 1280}


def _fits(looks: Looks) -> bool:
    return vectors_only(looks) and looks.widths <= _WIDTHS


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    return Embedding((Word(None, one(source, "")),), **header(source.metadata))


LAYOUT = EmbeddingLayout(
    name="bare",
    title="a tensor without a name",
    written_by="scripts",
    read_by="diffusers, when it is told a token",
    marks=(r"^$",),
    fits=_fits,
    encoders=ONE | sets("clip_g"),
    unwritten="nothing would tell it from an aesthetic embedding",
    read=read,
)
