"""Words as they travel inside a LoRA, without the LoRA: ``bundle_emb.NAME.…``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word, encoder_of
from sdformats.embeddings.layout import MIXED, ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import header, vectors, vectors_only
from sdformats.errors import CorruptFile

if TYPE_CHECKING:
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

_NAME = re.compile(r"bundle_emb\.(.+?)\.(?:(clip_[lg]|t5(?:xxl)?)|string_to_param\.\*)")
LONE = "string_to_param.*"


def read(source: TensorSource) -> Embedding:
    """Read every word.

    Raises:
        CorruptFile: a name says no encoder.
    """
    words: dict[str, dict[str, Ref]] = {}
    for key in source.specs:
        match = _NAME.fullmatch(key)
        if match is None:
            raise CorruptFile("names no text encoder", path=source.path, key=key, expected="bundle_emb.NAME.clip_l …")
        ref = vectors(source, key)
        encoder = match[2].removesuffix("xxl") if match[2] else encoder_of(ref.shape[1], "bert")
        words.setdefault(match[1], {})[encoder] = ref
    found = tuple(Word(token, inside) for token, inside in words.items())
    return Embedding(found, **header(source.metadata))


def names(word: Word) -> dict[str, Ref]:
    """Return a word's tensors by what stands behind its name."""
    (encoder, ref), *others = word.vectors.items()
    if not others and encoder not in ("clip_g", "t5") and encoder_of(ref.shape[1], "bert") == encoder:
        return {LONE: ref}
    return dict(word.vectors)


def write(embedding: Embedding) -> Written:
    """Write every word."""
    tensors = {
        f"bundle_emb.{word.token or '*'}.{name}": ref for word in embedding.words for name, ref in names(word).items()
    }
    return Written(tensors, embedding.texts)


LAYOUT = EmbeddingLayout(
    name="bundle",
    title="words as they travel inside a LoRA",
    written_by="A1111's bundled LoRAs, OneTrainer",
    read_by="A1111, Forge, SD.Next, OneTrainer, when they are inside a LoRA",
    marks=(r"^bundle_emb\.",),
    fits=vectors_only,
    containers=("safetensors",),
    encoders=ONE | MIXED | sets("bert"),
    several=True,
    names=True,
    read=read,
    write=write,
)
