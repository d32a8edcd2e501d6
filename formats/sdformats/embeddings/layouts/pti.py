"""cog-sdxl's ``.pti``: a tensor for each text encoder; the word is in ``special_params.json`` beside it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import header, vectors, vectors_only

if TYPE_CHECKING:
    from sdformats.tensor import TensorSource

_ENCODERS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_PARAMS = "special_params.json"
_LARGEST = 1 << 16


def read(source: TensorSource) -> Embedding:
    """Read the one word, whose vectors are tokens of their own there."""
    inside = {_ENCODERS[key]: vectors(source, key) for key in source.specs}
    token = _token(source)
    notes = () if token else (f"what its word is called is in {_PARAMS}, which is not beside it",)
    return Embedding((Word(token, inside),), trainer="cog-sdxl", notes=notes, **header(source.metadata))


def _token(source: TensorSource) -> str | None:
    """Return the word, where the settings name one: ``{"TOK": "<s0><s1>"}``."""
    path = source.path.with_name(_PARAMS)
    try:
        if path.stat().st_size > _LARGEST:
            return None
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or len(said) != 1:
        return None
    (word, stands_for), *_ = said.items()
    return word if isinstance(stands_for, str) and re.fullmatch(r"(<s\d+>)+", stands_for) else None


LAYOUT = EmbeddingLayout(
    name="pti",
    title="cog-sdxl's embeddings.pti",
    written_by="cog-sdxl (Replicate)",
    read_by="cog-sdxl, as one of several files in its archive",
    marks=(r"^text_encoders_[01]$",),
    fits=vectors_only,
    names=True,
    encoders=sets("clip_l clip_g"),
    unwritten="cog-sdxl reads it only out of an archive that its own trainer packs",
    read=read,
)
