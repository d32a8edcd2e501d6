"""cloneofsimo's words beside a LoRA, without the LoRA: tokens as names, and a text for each that says what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import ONE, EmbeddingLayout
from sdformats.embeddings.layouts._shared import header, one, only, vectors_only
from sdformats.views import reshaped

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

MARK = "<embed>"


def fits(looks: Looks) -> bool:
    """Whether every tensor is said to be a word."""
    return all(looks.metadata.get(name) == MARK for name in looks.specs) and vectors_only(looks)


def read(source: TensorSource) -> Embedding:
    """Read every word."""
    words = tuple(Word(key, one(source, key)) for key in source.specs)
    rest = {key: value for key, value in source.metadata.items() if key not in source.specs}
    return Embedding(words, trainer="cloneofsimo/lora", **header(rest))


def write(embedding: Embedding) -> Written:
    """Write every word.

    Raises:
        CannotHold: a word has several vectors.
    """
    tensors: dict[str, Ref] = {}
    for word in embedding.words:
        ref, token = only(word), word.token or "*"
        if ref.shape[0] > 1:
            raise CannotHold(
                f"has {ref.shape[0]} vectors, and the layout pivotal has a place for one",
                key=token,
                advice="choose another with --to",
            )
        tensors[token] = reshaped(ref, ref.shape[1:])
    return Written(tensors, embedding.texts | dict.fromkeys(tensors, MARK))


LAYOUT = EmbeddingLayout(
    name="pivotal",
    title="words of pivotal tuning",
    written_by="cloneofsimo/lora",
    read_by="cloneofsimo/lora",
    marks=(r"",),
    fits=fits,
    containers=("safetensors",),
    encoders=ONE,
    several=True,
    names=True,
    read=read,
    write=write,
)
