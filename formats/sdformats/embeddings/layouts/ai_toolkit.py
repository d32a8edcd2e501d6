"""ai-toolkit's safetensors: sd-scripts' names, with A1111's texts beside them as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts import kohya
from sdformats.embeddings.layouts._shared import OWN_TEXTS, header, vectors_only

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource


def fits(looks: Looks) -> bool:
    """Whether there is the text that says which tensor the word is."""
    return "string_to_param" in looks.metadata and vectors_only(looks)


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    word = Word(None, kohya.encoders(source))
    return Embedding((word,), trainer="ai-toolkit", **header(source.metadata, coded=True))


def write(embedding: Embedding) -> Written:
    """Write the one word."""
    (word,) = embedding.words
    plain = embedding.texts
    coded = {key: json.dumps(plain.get(key), ensure_ascii=False) for key in OWN_TEXTS[2:6]}
    coded["step"] = str(embedding.step or 0)
    own = {"string_to_token": '{"*": 265}', "string_to_param": '{"*": "emb_params"}'}
    return Written(kohya.tensors(word), own | coded | dict(embedding.metadata))


LAYOUT = EmbeddingLayout(
    name="ai-toolkit",
    title="ai-toolkit's safetensors",
    written_by="ai-toolkit",
    read_by="ai-toolkit, and what reads sd-scripts'",
    marks=(r"^(emb_params|clip_[lg])$",),
    fits=fits,
    containers=("safetensors",),
    encoders=ONE | sets("clip_l clip_g"),
    read=read,
    write=write,
)
