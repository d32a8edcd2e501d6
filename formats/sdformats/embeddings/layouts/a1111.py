"""A1111's ``.pt``: one word under ``*``, with its name, steps and checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import ONE, EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import PARAM, a1111_tree, header, one, only, vectors_only
from sdformats.errors import CorruptFile

if TYPE_CHECKING:
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource

_INSIDE = f"{PARAM}_parameters."
"""The first versions of torch kept a ParameterDict's tensors there."""
TENSOR = f"{PARAM}*"


def fits(looks: Looks) -> bool:
    """Whether there is one word, and what A1111 says beside it."""
    words = [name for name in looks.specs if name.startswith(PARAM)]
    return len(words) == len(looks.specs) == 1 and "string_to_token" in looks.metadata and vectors_only(looks)


def words(source: TensorSource) -> tuple[Word, ...]:
    """Return every word under ``string_to_param``.

    Raises:
        CorruptFile: there is none.
    """
    keys = {
        key.removeprefix(_INSIDE if key.startswith(_INSIDE) else PARAM): key
        for key in source.specs
        if key.startswith(PARAM)
    }
    if not keys:
        raise CorruptFile("holds no word under string_to_param", path=source.path)
    return tuple(Word(None if token == "*" else token, one(source, key, "bert")) for token, key in keys.items())


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    trainer = "ai-toolkit" if "notes" in source.metadata else "A1111's web UI"
    notes = []
    if source.path.with_name(f"{source.path.name}.optim").is_file():
        notes.append(f"{source.path.name}.optim beside it holds the optimizer's state, which only training needs")
    return Embedding(words(source), trainer=trainer, notes=tuple(notes), **header(source.metadata))


def write(embedding: Embedding) -> Written:
    """Write the one word."""
    (word,) = embedding.words
    return Written({TENSOR: only(word)}, {}, tree=a1111_tree(embedding, TENSOR))


LAYOUT = EmbeddingLayout(
    name="a1111",
    title="A1111's .pt, which most programs read",
    written_by="A1111's web UI, SD.Next, Forge, ai-toolkit",
    read_by="A1111, SD.Next, Forge, ComfyUI, InvokeAI, diffusers, sd-scripts, OneTrainer",
    marks=(r"^string_to_(param|token)\.",),
    fits=fits,
    containers=("torch", "png"),
    encoders=ONE | sets("bert"),
    read=read,
    write=write,
)
