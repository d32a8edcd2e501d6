"""What there is to say about an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.embeddings import open_embedding
from sdformats.errors import FormatError
from sdformats.views import floats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

_DIGITS = 4


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON. Reads its vectors, which are few.

    Returns:
        ``name`` (what the file calls itself), ``step``, ``trained_on``, ``checkpoint_hash``, ``trainer``, ``words``: for each
        its ``token`` (null: programs go by the file's name), ``vectors`` and ``outputs`` ([count, width] by encoder), and
        ``norms``, the vectors' lengths (by encoder; null for types that are not read here).

    Raises:
        FormatError: it is broken.
    """
    embedding, _ = open_embedding(source)
    return {
        "name": embedding.name,
        "step": embedding.step,
        "trained_on": embedding.checkpoint,
        "checkpoint_hash": embedding.checkpoint_hash,
        "trainer": embedding.trainer,
        "words": [
            {
                "token": word.token,
                "vectors": _shapes(word.vectors),
                "outputs": _shapes(word.outputs),
                "norms": {encoder: _norms(ref) for encoder, ref in word.vectors.items()},
            }
            for word in embedding.words
        ],
        "notes": [note for note in embedding.notes if note not in source.notes],
    }


def _shapes(refs: Mapping[str, Ref]) -> dict[str, list[int]]:
    return {encoder: list(ref.shape) for encoder, ref in refs.items()}


def _norms(ref: Ref) -> list[float | None] | None:
    """Return the vectors' lengths; None for one that is not finite, which JSON cannot say."""
    try:
        values = floats(ref).astype(np.float64)
    except FormatError:
        return None
    lengths = np.sqrt((values * values).sum(axis=1)).tolist()
    return [round(length, _DIGITS) if np.isfinite(length) else None for length in lengths]
