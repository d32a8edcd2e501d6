"""Sentences with a gap for a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sdmerge.errors import RequestError
from sdmerge.train.templates import OBJECT, filled, templates

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sentence_is_drawn_and_filled() -> None:
    source = torch.Generator().manual_seed(0)
    drawn = {filled(templates("object"), "<dog>", "unused", source) for _ in range(400)}
    assert drawn == {sentence.replace("{}", "<dog>") for sentence in OBJECT}
    assert filled(templates("captions"), "<dog>", "a <dog> asleep", source) == "a <dog> asleep"


def test_a_file_of_either_spelling(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\ufeffart by [name]\n\n{} and [filewords]\n", encoding="utf-8")
    assert templates(str(file)) == ("art by {}", "{} and {caption}")


@pytest.mark.parametrize("text", ["no gap\n", ""])
def test_a_file_without_a_gap(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="every line of a template needs"):
        templates(str(file))
    with pytest.raises(RequestError, match="none of object, style, captions"):
        templates("objects")
