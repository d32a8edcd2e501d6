"""DreamArtist: a word and its negative are better together than the word alone, and that than a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import concept, embedding_effects
from sdmerge.errors import RequestError
from sdmerge.train.dream_artist import guidance
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path


def test_both_words_are_better_than_one_and_one_than_a_prompt(toy: Path, tmp_path: Path) -> None:
    found = embedding_effects.dream_artist(toy, tmp_path, 0, steps=40, alone=0.5, count=12)
    assert found["prompt"] > found["positive"] > found["both"]


def test_two_files(toy: Path, tmp_path: Path) -> None:
    data = concept.write(concept.diamonds(4, seed=1, token="<diamond>"), tmp_path / "data")
    given = {"token": "<diamond>", "template": "captions", "scale": "1-3:cos", "reconstruction": 0.1, "masked": True}
    runs.trained("dream-artist", toy, data, tmp_path / "thing.pt", steps=2, vectors=2, negative_vectors=3, **given)
    for name, count in (("thing", 2), ("thing-neg", 3)):
        held = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert held["string_to_param"]["*"].shape == (count, 48)
        assert held["step"] == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", [3.0, 3.0, 3.0]),
        ("1-5:ln", [1.0, 3.0, 5.0]),
        ("1-5:cos", [1.0, 1 + 4 * 0.5**0.5, 5.0]),
        ("1-5:cos2", [1.0, 5 - 4 * 0.5**0.5, 5.0]),
    ],
)
def test_guidance_over_the_noise(text: str, wanted: list[float]) -> None:
    torch.testing.assert_close(guidance(text)(torch.tensor([0.0, 0.5, 1.0])), torch.tensor(wanted))


@pytest.mark.parametrize("text", ["", "three", "1-", "1-5", "1-5:sin", "-1"])
def test_no_guidance(text: str) -> None:
    with pytest.raises(RequestError, match="scale is"):
        guidance(text)
