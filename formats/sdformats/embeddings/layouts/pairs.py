"""Vectors one by one: ``{emb, emb2}`` for both of SDXL's text encoders, or a list of such dicts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import header, vectors, vectors_only
from sdformats.errors import CorruptFile
from sdformats.views import Ref, joined

if TYPE_CHECKING:
    from sdformats.tensor import TensorSource

_ENCODERS = {"emb": "clip_l", "emb2": "clip_g"}
_NAME = re.compile(r"(?:(\d{1,4})\.)?(emb2?)")


def read(source: TensorSource) -> Embedding:
    """Read the one word; the dicts of a list are its vectors, in order.

    Raises:
        CorruptFile: the dicts are not alike.
    """
    found: dict[str, dict[int, Ref]] = {}
    for key in source.specs:
        match = _NAME.fullmatch(key)
        if match is None:
            raise CorruptFile("is no name of this layout", path=source.path, key=key, expected="emb or emb2")
        found.setdefault(_ENCODERS[match[2]], {})[int(match[1] or 0)] = vectors(source, key)
    inside: dict[str, Ref] = {}
    for encoder, numbered in found.items():
        refs = [numbered[number] for number in sorted(numbered)]
        alike = len({(ref.spec.dtype, ref.shape[1]) for ref in refs}) == 1
        if not alike or sorted(numbered) != list(range(len(numbered))) or len(refs) != len(next(iter(found.values()))):
            raise CorruptFile(f"has vectors for {encoder} that do not belong together", path=source.path)
        inside[encoder] = joined(refs)
    return Embedding((Word(None, inside),), trainer="XL-Textual-Inversion", **header(source.metadata))


LAYOUT = EmbeddingLayout(
    name="pairs",
    title="{emb, emb2}, or a list of them",
    written_by="XL-Textual-Inversion",
    read_by="XL-Textual-Inversion",
    marks=(r"^(\d+\.)?emb2?$",),
    fits=vectors_only,
    encoders=sets("clip_l clip_g"),
    unwritten="only the notebook that wrote it reads it",
    read=read,
)
