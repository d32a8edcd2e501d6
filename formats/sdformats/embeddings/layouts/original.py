"""The first program's ``embeddings_gs-N.pt``: any number of words, in a torch module of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.embeddings.embedding import Embedding
from sdformats.embeddings.layout import ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts import a1111, hcp
from sdformats.embeddings.layouts._shared import PARAM, header, vectors_only

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource


def _fits(looks: Looks) -> bool:
    return vectors_only(looks) and not a1111.fits(looks) and not hcp.fits(looks)


def read(source: TensorSource) -> Embedding:
    """Read every word."""
    return Embedding(a1111.words(source), trainer="textual_inversion, the first program", **header(source.metadata))


LAYOUT = EmbeddingLayout(
    name="original",
    title="embeddings_gs-N.pt of the first program",
    written_by="textual_inversion (Gal et al.), InvokeAI's first versions",
    read_by="textual_inversion, A1111",
    marks=(r"^string_to_(param|token)\.",),
    needs=(rf"^{PARAM}",),
    fits=_fits,
    several=True,
    names=True,
    encoders=ONE | sets("bert"),
    unwritten="its reader wants a pickled torch module, and the words' numbers in the vocabulary of its tokenizer",
    read=read,
)
