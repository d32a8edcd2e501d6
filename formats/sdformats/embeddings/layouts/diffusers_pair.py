"""diffusers' two files for SDXL, in one folder: ``learned_embeds`` and ``learned_embeds_2``, one for each text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word
from sdformats.embeddings.layout import EmbeddingLayout, sets
from sdformats.embeddings.layouts._shared import header, vectors, vectors_only
from sdformats.errors import CorruptFile
from sdformats.folder import LEARNED

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.tensor import TensorSource

_FIRST, _SECOND = LEARNED


def second_of(path: Path) -> Path | None:
    """Return the second file that is beside a first one."""
    if not path.name.startswith(f"{_FIRST}.") and not path.name.startswith(f"{_FIRST}-"):
        return None
    second = path.with_name(_SECOND + path.name.removeprefix(_FIRST))
    return second if second.is_file() else None


def read(source: TensorSource) -> Embedding:
    """Read every word.

    Raises:
        CorruptFile: a word is in one of the files alone.
    """
    halves = [
        {key.removeprefix(f"{name}."): key for key in source.specs if key.startswith(f"{name}.")} for name in LEARNED
    ]
    if alone := [*(halves[0].keys() ^ halves[1].keys())]:
        raise CorruptFile("is in one of the two files alone", path=source.path, key=sorted(alone)[0])
    words = tuple(
        Word(
            None if token == "*" else token,
            {"clip_l": vectors(source, halves[0][token]), "clip_g": vectors(source, halves[1][token])},
        )
        for token in halves[0]
    )
    return Embedding(words, trainer="diffusers", **header(source.metadata))


def write(embedding: Embedding) -> Written:
    """Write every word into both files."""
    tensors = {
        f"{name}.safetensors/{word.token or '*'}": word.vectors[encoder]
        for name, encoder in zip(LEARNED, ("clip_l", "clip_g"), strict=True)
        for word in embedding.words
    }
    return Written(tensors, embedding.texts)


LAYOUT = EmbeddingLayout(
    name="diffusers-pair",
    title="diffusers' two files for SDXL, in a folder",
    written_by="diffusers (textual_inversion_sdxl.py)",
    read_by="diffusers, one file after the other",
    marks=(rf"^({_FIRST}|{_SECOND})\.",),
    needs=(rf"^{_FIRST}\.", rf"^{_SECOND}\."),
    fits=vectors_only,
    containers=("folder",),
    encoders=sets("clip_l clip_g"),
    several=True,
    names=True,
    read=read,
    write=write,
)
