"""A text encoder and its tokenizer, and new words whose vectors stand beside its table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Module

LENGTH = 77
"""Tokens that a text encoder reads."""


class TextEncoder:
    """A text encoder and its tokenizer.

    Args:
        model: CLIP's text model of transformers.
        tokenizer: transformers' too.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.words: dict[str, Tensor] = {}
        """Vectors [n, width] of new words, in the order in which they were added."""
        self._first = len(tokenizer)
        self._asked: Tensor | None = None

    def __call__(self, texts: Sequence[str]) -> Any:
        """Return what transformers returns for texts, all hidden states included."""
        ids = self.tokens(texts).to(self.model.device)
        # The encoder never sees the numbers of new words: it finds the end of a text by the largest number or by its own.
        self._asked = ids
        known = ids.where(ids < self._first, torch.zeros_like(ids))
        return self.model(input_ids=known, output_hidden_states=True)

    @property
    def table(self) -> Module:
        """The layer that has a vector for each token."""
        found: Module = self.model.get_input_embeddings()
        return found

    @property
    def width(self) -> int:
        """How many numbers the vector of a token has."""
        return int(self.model.config.hidden_size)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers [n, 77], padded and cut as the model was trained."""
        expanded = [self._expanded(text) for text in texts]
        made = self.tokenizer(expanded, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        found: Tensor = made.input_ids
        return found

    def is_too_long(self, text: str) -> bool:
        """Whether words of a text are cut off."""
        return len(self.tokenizer(self._expanded(text)).input_ids) > LENGTH

    def vectors(self, words: str) -> Tensor:
        """Return the table's vectors of the tokens of some words, [n, width], without those of beginning and end."""
        ids = self.tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0].long()
        found: Tensor = self.table.weight[ids.to(self.model.device)].detach().float()  # type: ignore[index]
        return found

    def add_word(self, word: str, vectors: Tensor) -> None:
        """Let a word stand for vectors [n, width]. Where they are a parameter, gradients reach it.

        Raises:
            RequestError: the vocabulary has it already, or there is nothing to it.
        """
        if not word.strip():
            raise RequestError("the new word is empty (expected one that the vocabulary lacks, as '<new1>')")
        names = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
        known = len(self.tokenizer(word, add_special_tokens=False).input_ids) == 1
        if known or self.tokenizer.add_tokens(names) != len(names):
            raise RequestError(f"{word!r} is in the model's vocabulary already (expected a new word, as '<new1>')")
        if not self.words:
            self.table.register_forward_hook(self._beside)
        self.words[word] = vectors

    def _expanded(self, text: str) -> str:
        """Write every token of words that have several."""
        for word, vectors in self.words.items():
            if len(vectors) > 1:
                whole = " ".join([word, *(f"{word}_{i}" for i in range(1, len(vectors)))])
                text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _, whole=whole: whole, text)  # type: ignore[misc]
        return text

    def _beside(self, _table: Module, _given: object, found: Tensor) -> Tensor:
        """Put the vectors of new words in their places."""
        if self._asked is None:
            return found
        new = torch.cat([vectors.to(found) for vectors in self.words.values()])
        places = (self._asked - self._first).clamp(min=0)
        return torch.where((self._asked >= self._first)[..., None], new[places], found)

    @property
    def final_norm(self) -> Module:
        """The normalisation behind the last layer. transformers 5 has it at the top, earlier ones did not."""
        inner = getattr(self.model, "text_model", self.model)
        found: Module = inner.final_layer_norm
        return found
