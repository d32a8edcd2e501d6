"""Write a new word, in any layout of embeddings."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.embeddings.embedding import Embedding, Word
from sdformats.files import open_source
from sdmerge import hashing
from sdmerge.embedding.write import Wanted, write_embedding
from sdmerge.options import Options
from sdmerge.policy import Notes
from sdmerge.train.saving import dtype_of, held
from sdmerge.train.words import ENCODERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.settings import Settings


def save_word(
    token: str,
    vectors: Mapping[str, Tensor],
    family: str,
    to: str | None,
    settings: Settings,
    texts: Mapping[str, str],
    saving: Saving,
) -> Report:
    """Write a new word, with its name, its steps and the model's name and hash where the layout has a place for them.

    Args:
        vectors: for each text encoder, ``te1`` and ``te2``, [count, width].
        to: the layout; None: the usual one for the output's ending.

    Raises:
        sdmerge.errors.RequestError: there is no such layout, or the output's name does not fit it.
        sdformats.errors.FormatError: the layout has no place for it, or it cannot be written.
    """
    started = time.perf_counter()
    dtype = dtype_of(settings)
    refs = {encoder: held(vectors[f"te{i}"], dtype) for i, encoder in enumerate(ENCODERS[family], 1)}
    model = Path(settings.model.model)
    embedding = Embedding(
        (Word(token, refs),),
        name=token.strip("<>"),
        step=saving.step,
        checkpoint=model.stem,
        checkpoint_hash=None if saving.dry_run else _short_hash(model),
        trainer="sdmerge",
        metadata=dict(texts) if saving.target.suffix in (".safetensors", "") else {},
    )
    options = Options(overwrite=True, dry_run=saving.dry_run)
    return write_embedding(embedding, (), saving.target, Wanted(to=to), options, started, Notes())


@cache
def _short_hash(model: Path) -> str | None:
    """Return what A1111 calls a model: the first ten digits of its sha256; None for a folder."""
    with open_source(model) as source:
        return hashing.sha256(source.files[0])[:10] if len(source.files) == 1 else None
