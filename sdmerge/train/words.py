"""What vectors of new words begin as, and how long the vectors of a text encoder usually are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from sdmerge.train.text import TextEncoder

RANDOM, EMPTY, ZEROS = "<random>", "<empty>", "<zeros>"
ENCODERS = {"sd1": ("clip_l",), "sd2": ("open_clip",), "sdxl": ("clip_l", "clip_g")}
"""What embeddings call the text encoders of a family."""


def usual_length(text: TextEncoder) -> float:
    """Return the median length of the vectors in a text encoder's table."""
    return float(torch.linalg.vector_norm(text.table.weight.detach().float(), dim=1).median())  # type: ignore[operator]


def starting(text: TextEncoder, init: str, count: int) -> Tensor:
    """Return what new vectors begin as, [count, width] float32.

    Args:
        init: words, whose vectors are repeated as evenly as they can be; or ``<random>``, of the words' usual length;
            ``<empty>``, what texts are padded with; ``<zeros>``.

    Raises:
        RequestError: the words are none, or more than there are vectors.
    """
    if init == ZEROS:
        return torch.zeros(count, text.width)
    if init == RANDOM:
        drawn = torch.randn(count, text.width)
        made: Tensor = drawn * usual_length(text) / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        return made
    found = text.vectors(text.tokenizer.pad_token if init == EMPTY else init).cpu()
    if not 1 <= len(found) <= count:
        raise RequestError(
            f"init {init!r} is {len(found)} tokens long (expected 1 to {count}: give fewer words, or more vectors)"
        )
    return torch.stack([found[i * len(found) // count] for i in range(count)])
