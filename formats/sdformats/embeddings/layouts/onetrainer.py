"""OneTrainer's names: ``emp_params`` (with a p), or the encoders' names; ``*_out`` for vectors behind a text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word, encoder_of
from sdformats.embeddings.layout import MIXED, ONE, EmbeddingLayout
from sdformats.embeddings.layouts._shared import header, vectors, vectors_only

if TYPE_CHECKING:
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

_LONE = "emp_params"
_OUT = "_out"


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    inside: dict[str, Ref] = {}
    behind: dict[str, Ref] = {}
    for key in source.specs:
        ref, name = vectors(source, key), key.removesuffix(_OUT)
        encoder = encoder_of(ref.shape[1]) if name == _LONE else name
        (behind if key.endswith(_OUT) else inside)[encoder] = ref
    return Embedding((Word(None, inside, behind),), trainer="OneTrainer", **header(source.metadata))


def write(embedding: Embedding) -> Written:
    """Write the one word."""
    (word,) = embedding.words
    refs = [*word.vectors.values(), *word.outputs.values()]
    alone = word.encoders in ONE and all(encoder_of(ref.shape[1]) in word.encoders for ref in refs)
    tensors = {_LONE if alone else encoder: ref for encoder, ref in word.vectors.items()}
    tensors |= {(_LONE if alone else encoder) + _OUT: ref for encoder, ref in word.outputs.items()}
    return Written(tensors, embedding.texts)


LAYOUT = EmbeddingLayout(
    name="onetrainer",
    title="OneTrainer's safetensors",
    written_by="OneTrainer",
    read_by="OneTrainer; of SDXL's without *_out, what reads sd-scripts'",
    marks=(r"^(emp_params|clip_[lg]|t5)(_out)?$",),
    needs=(r"^emp_params|_out$",),
    fits=vectors_only,
    containers=("safetensors",),
    encoders=ONE | MIXED,
    outputs=True,
    read=read,
    write=write,
)
