"""diffusers' ``learned_embeds``: vectors under their words' own tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts import diffusers_pair, pivotal
from sdformats.embeddings.layouts._shared import header, one, only, vectors_only
from sdformats.torch_pickle import TensorNamed

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

_BRACKETED = r"^<.*>$|^\*$"
_TAKEN = (
    r"em[bp]_params|clip_[lg]|clip_image|t5|t5xxl|emb2?|head|embed|aesthetic_embedding|null_text|text_encoders_\d+|\d+"
)
_PLAIN = rf"^(?!({_TAKEN})(_out)?$)[^.]+$"
"""Any other single name: tokens may have spaces, but what other layouts call their tensors is none."""
_WIDTHS = {768, 1024, 1280}


def _fits(looks: Looks) -> bool:
    if not vectors_only(looks) or len(looks.floats) < len(looks.specs) or pivotal.fits(looks):
        return False
    if all(re.search(_BRACKETED, name) for name in looks.specs):
        return True
    return len(looks.specs) == 1 and looks.widths <= _WIDTHS


def read(source: TensorSource) -> Embedding:
    """Read every word."""
    words = tuple(Word(None if key == "*" else key, one(source, key)) for key in source.specs)
    second = diffusers_pair.second_of(source.path)
    notes = (
        [f"{second.name} beside it holds the second encoder's vectors: give the folder to read both"] if second else []
    )
    return Embedding(words, trainer="diffusers", notes=tuple(notes), **header(source.metadata))


def write(embedding: Embedding) -> Written:
    """Write every word. Where its bare name would not be known for one again, it is put into ``<>``."""
    alone = len(embedding.words) == 1
    tensors: dict[str, Ref] = {}
    for word in embedding.words:
        token, ref = word.token or "*", only(word)
        plain = alone and re.search(_PLAIN, token) and ref.shape[1] in _WIDTHS
        tensors[token if plain or re.search(_BRACKETED, token) else f"<{token}>"] = ref
    return Written(tensors, embedding.texts, tree={name: TensorNamed(name) for name in tensors})


LAYOUT = EmbeddingLayout(
    name="diffusers",
    title="diffusers' learned_embeds",
    written_by="diffusers",
    read_by="diffusers, A1111, SD.Next, Forge, ComfyUI, InvokeAI, sd-scripts",
    marks=(_BRACKETED, _PLAIN),
    fits=_fits,
    containers=("safetensors", "torch"),
    encoders=ONE | sets("clip_g"),
    several=True,
    names=True,
    read=read,
    write=write,
)
