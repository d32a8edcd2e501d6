"""What several layouts have in common: vectors of any rank, and the texts that A1111 keeps beside them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sdformats.embeddings.embedding import encoder_of
from sdformats.errors import CorruptFile
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Stored, reshaped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.embeddings.embedding import Embedding, Word
    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.torch_pickle import Tree
    from sdformats.views import Ref

_MOST_TENSORS, _MOST_NUMBERS = 256, 1280 * 256
OWN_TEXTS = ("string_to_token", "string_to_param", "name", "step", "sd_checkpoint", "sd_checkpoint_name", "format")
"""What is known of an embedding by name, and is not carried along as the trainer's."""
PARAM = "string_to_param."
_LONGEST_STEP = 18


def vectors_only(looks: Looks) -> bool:
    """Whether there are few tensors of numbers, each a vector or a list of vectors."""
    return 0 < len(looks.floats) <= _MOST_TENSORS and all(
        1 <= len(spec.shape) <= 2 and spec.numel <= _MOST_NUMBERS for spec in looks.floats.values()
    )


def vectors(source: TensorSource, key: str) -> Ref:
    """Return a tensor as (n, width).

    Raises:
        CorruptFile: it is neither a vector nor a list of vectors.
    """
    spec = source.specs[key]
    if not spec.dtype.is_float or not 1 <= len(spec.shape) <= 2 or not spec.numel:
        raise CorruptFile(f"is {spec}", path=source.path, key=key, expected="one or more vectors of numbers")
    ref = Stored(source, key)
    return reshaped(ref, (1, *spec.shape)) if len(spec.shape) == 1 else ref


def one(source: TensorSource, key: str, wide: str = "clip_g") -> dict[str, Ref]:
    """Return a tensor by the encoder that its width is for."""
    ref = vectors(source, key)
    return {encoder_of(ref.shape[1], wide): ref}


def header(metadata: Mapping[str, str], *, coded: bool = False) -> dict[str, Any]:
    """Return what the texts say about an embedding, as keyword arguments of `Embedding`.

    Args:
        metadata: the texts beside it.
        coded: whether every text is JSON.
    """
    step = _text(metadata, "step", coded)
    return {
        "name": _text(metadata, "name", coded) or metadata.get("modelspec.title"),
        "step": int(step) if step and re.fullmatch(r"[0-9]+", step) and len(step) <= _LONGEST_STEP else None,
        "checkpoint": _text(metadata, "sd_checkpoint_name", coded),
        "checkpoint_hash": _text(metadata, "sd_checkpoint", coded),
        "metadata": {key: value for key, value in metadata.items() if key not in OWN_TEXTS},
    }


def _text(metadata: Mapping[str, str], key: str, coded: bool) -> str | None:
    value = metadata.get(key)
    if value is None or value == "null":  # what no text was, None, is read as JSON
        return None
    if coded:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    return str(value)


def a1111_tree(embedding: Embedding, tensor: str) -> dict[str, Tree]:
    """Return what A1111 pickles: the only word stands for ``*``, whose number in CLIP's vocabulary is 265."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": TensorNamed(tensor)},
        "name": embedding.name,
        "step": embedding.step,
        "sd_checkpoint": embedding.checkpoint_hash,
        "sd_checkpoint_name": embedding.checkpoint,
        **embedding.metadata,
    }


def only(word: Word) -> Ref:
    """Return the vectors of a word for one encoder."""
    (ref,) = word.vectors.values()
    return ref
