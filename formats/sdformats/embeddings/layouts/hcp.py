"""HCP-Diffusion's ``.pt``: A1111's, with nothing but a name beside the word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding
from sdformats.embeddings.layout import ONE, EmbeddingLayout
from sdformats.embeddings.layouts import a1111
from sdformats.embeddings.layouts._shared import header, only, vectors_only
from sdformats.torch_pickle import TensorNamed

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.torch_pickle import Tree


def fits(looks: Looks) -> bool:
    """Whether there is one word and its name, but no numbers of words."""
    alone = list(looks.specs) == [a1111.TENSOR] and "string_to_token" not in looks.metadata
    return alone and "name" in looks.metadata and vectors_only(looks)


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    return Embedding(a1111.words(source), trainer="HCP-Diffusion", **header(source.metadata))


def write(embedding: Embedding) -> Written:
    """Write the one word."""
    (word,) = embedding.words
    tree: Tree = {"string_to_param": {"*": TensorNamed(a1111.TENSOR)}, "name": embedding.name or ""}
    return Written({a1111.TENSOR: only(word)}, {}, tree=tree)


LAYOUT = EmbeddingLayout(
    name="hcp",
    title="HCP-Diffusion's .pt",
    written_by="HCP-Diffusion",
    read_by="HCP-Diffusion, and what reads A1111's",
    marks=(r"^string_to_param\.",),
    fits=fits,
    containers=("torch",),
    encoders=ONE,
    read=read,
    write=write,
)
