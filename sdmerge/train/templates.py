"""What a network is told about pictures of a new word: sentences with a gap for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

OBJECT = (
    "a photo of a {}",
    "a picture of a {}",
    "a rendering of a {}",
    "a close-up photo of a {}",
    "a cropped photo of the {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a photo of one {}",
    "a photo of my {}",
    "a photo of the nice {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a good photo of a {}",
    "a photo of a clean {}",
)
STYLE = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "a rendering in the style of {}",
    "a close-up painting in the style of {}",
    "a cropped painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a large painting in the style of {}",
)
CAPTIONS = ("{caption}",)
NAMED = {"object": OBJECT, "style": STYLE, "captions": CAPTIONS}
_LARGEST = 1 << 20


def templates(wanted: str) -> tuple[str, ...]:
    """Return sentences in which ``{}`` stands for the word, and ``{caption}`` for the picture's caption.

    Args:
        wanted: ``object``, ``style``, ``captions``, or a text file with a sentence on each line; A1111's ``[name]`` and
            ``[filewords]`` are understood.

    Raises:
        RequestError: the file cannot be read, or holds no sentence with a place for the word or the caption.
    """
    if wanted in NAMED:
        return NAMED[wanted]
    try:
        with Path(wanted).open("rb") as file:
            lines = file.read(_LARGEST).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"template {wanted!r} is none of {', '.join(NAMED)}, and no text file that can be read: {error}"
        ) from error
    found = tuple(
        line.strip().replace("[name]", "{}").replace("[filewords]", "{caption}") for line in lines if line.strip()
    )
    if not found or not all("{}" in line or "{caption}" in line for line in found):
        raise RequestError(
            f"{wanted}: every line of a template needs {{}} where the word stands (or [name], [filewords])"
        )
    return found


def filled(sentences: Sequence[str], word: str, caption: str, source: torch.Generator) -> str:
    """Return one of the sentences, drawn at random, with its gaps filled."""
    drawn = int(torch.randint(len(sentences), (), generator=source))
    return sentences[drawn].replace("{}", word).replace("{caption}", caption).strip()
