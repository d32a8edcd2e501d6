"""What a model's cross-attention reads of a text: token features, from the model's own text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdformats.layout import detect
from sdmerge.errors import MismatchError
from sdmerge.lora.refs import value
from sdmerge.train.loading import text_encoders
from sdmerge.train.networks import Networks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.train.settings import ModelSettings
    from sdmerge.train.text import TextEncoder

_BATCH = 16


class Reader:
    """A model's text encoders, with new words.

    Args:
        source: the model, open.
        settings: where its tokenizer and configuration are.
        words: vectors of each word, one for each text encoder.

    Raises:
        MismatchError: a word has vectors of other widths.
        RequestError: a word is one of the model's own tokens; and as loading the text encoders does.
        sdformats.errors.FormatError: as loading the text encoders does.
    """

    def __init__(self, source: TensorSource, settings: ModelSettings, words: Mapping[str, Sequence[Ref]]) -> None:
        texts = text_encoders(source, settings)
        for index, text in enumerate(texts):
            for word, vectors in words.items():
                if len(vectors) != len(texts):
                    raise MismatchError(
                        f"the word {word} has {len(vectors)} vectors (expected {len(texts)}, one for each encoder)"
                    )
                _add(text, word, value(vectors[index]))
        family = detect(source.specs, family=settings.family).family
        self._networks = Networks(family or "", None, None, texts, {}, settings.clip_skip)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Return the features of every token of some texts but the first, which is always the same, up to the end's.

        Returns:
            [tokens, width], float64.
        """
        found = []
        for start in range(0, len(texts), _BATCH):
            part = texts[start : start + _BATCH]
            context = self._networks.read(part).context
            encoder = self._networks.texts[0]
            ends = (encoder.tokens(part) == encoder.tokenizer.eos_token_id).int().argmax(1)
            found += [row[1 : int(end) + 1].double() for row, end in zip(context, ends, strict=True)]
        return torch.cat(found)


def _add(text: TextEncoder, word: str, vectors: Tensor) -> None:
    """Give a text encoder a word."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    if rows.shape[1] != text.width:
        raise MismatchError(f"the word {word} has a vector of {rows.shape[1]} (expected {text.width})")
    text.add_word(word, rows)
