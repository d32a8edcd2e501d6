"""What new words begin as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from sdmerge.train.words import starting, usual_length

if TYPE_CHECKING:
    from pathlib import Path

    from sdmerge.train.text import TextEncoder


@pytest.fixture(scope="module")
def text(toy: Path) -> TextEncoder:
    return load(ModelSettings(model=str(toy))).texts[0]


def test_words_are_spread_over_the_vectors(text: TextEncoder) -> None:
    red, heart = text.vectors("red heart")
    assert torch.equal(starting(text, "red heart", 5), torch.stack([red, red, red, heart, heart]))


def test_no_words(text: TextEncoder) -> None:
    table = text.model.get_input_embeddings().weight
    assert torch.equal(starting(text, "<zeros>", 2), torch.zeros(2, text.width))
    assert torch.equal(starting(text, "<empty>", 2), table[[text.tokenizer.pad_token_id] * 2])
    drawn = starting(text, "<random>", 3)
    torch.testing.assert_close(drawn.norm(dim=1), torch.full((3,), float(table.norm(dim=1).median())))
    assert usual_length(text) == pytest.approx(float(table.norm(dim=1).median()))


@pytest.mark.parametrize("init", ["red heart moon", ""])
def test_too_many_words_or_none(text: TextEncoder, init: str) -> None:
    with pytest.raises(RequestError, match="tokens long"):
        starting(text, init, 2)
