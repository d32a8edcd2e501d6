"""Aesthetic gradients: a text encoder moved toward a style, for one prompt (Gallego 2022)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity, linear

from sdformats.aesthetic import read_aesthetic
from sdformats.errors import FormatError
from sdformats.files import open_source
from sdmerge.errors import RequestError
from sdmerge.lora.refs import finite
from sdmerge.train.networks import Condition

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdmerge.train.networks import Networks
    from sdmerge.train.text import TextEncoder


@dataclass(frozen=True, kw_only=True)
class Style:
    """An aesthetic embedding, and how it is applied.

    Attributes:
        embedding: [width].
        projection: of the text encoder's vector, [width, inner]; None where the text encoder has its own.
        steps: steps of Adam on the text encoder, for every prompt anew.
        rate: their learning rate.
        weight: how much of the moved encoder's output is taken, 0..1.
        slerp: mix along the arc between the outputs of the encoders, not the line.
    """

    embedding: Tensor
    projection: Tensor | None = None
    steps: int = 5
    rate: float = 1e-4
    weight: float = 1.0
    slerp: bool = False


def moved(text: TextEncoder, prompt: str, style: Style) -> TextEncoder:
    """Return a copy of a text encoder, moved toward a style by a prompt: Adam on -cos(features of the prompt, style)."""
    found = copy.deepcopy(text)
    found.model.requires_grad_(True)
    optimizer = torch.optim.Adam(found.model.parameters(), lr=style.rate)
    aim = style.embedding.to(text.model.device).float()[None]
    for _ in range(style.steps):
        with torch.enable_grad():
            loss = -cosine_similarity(_features(found, prompt, style), aim).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found.model.requires_grad_(False)
    return found


def _features(text: TextEncoder, prompt: str, style: Style) -> Tensor:
    """Return where a prompt is in the space that texts and pictures share, [1, width]."""
    found = text([prompt])
    if hasattr(found, "text_embeds"):
        features: Tensor = found.text_embeds
        return features
    assert style.projection is not None, "`encoder_for` asks for it"
    return linear(found.pooler_output, style.projection.to(found.pooler_output))


def encoder_for(networks: Networks, style: Style) -> int:
    """Return which text encoder a style moves: the one whose space has its width.

    Raises:
        RequestError: none has, or the projection into that space is missing.
    """
    if networks.family == "sd2":
        raise RequestError(
            "SD2's files leave out the last layer of the text encoder, without which no style can be applied"
        )
    for i, text in enumerate(networks.texts):
        projection = getattr(text.model, "text_projection", None)
        weight = style.projection if projection is None else projection.weight
        if weight is not None and len(weight) == len(style.embedding):
            return i
    raise RequestError(
        f"is a style {len(style.embedding)} wide, and no text encoder's features are (expected an embedding made with the "
        "CLIP model that the text encoder comes from; give that with --clip)"
    )


def read(networks: Networks, prompt: str, style: Style) -> Condition:
    """Return what the UNet is told by one prompt in a style. The empty prompt has none.

    Raises:
        RequestError: the style is not for this model.
    """
    with torch.no_grad():
        plain = networks.read([prompt])
    place = encoder_for(networks, style)
    if not prompt or not style.steps:
        return plain
    texts = [moved(text, prompt, style) if i == place else text for i, text in enumerate(networks.texts)]
    with torch.no_grad():
        far = replace(networks, texts=tuple(texts)).read([prompt])
    pooled = None
    if plain.pooled is not None and far.pooled is not None:
        pooled = mixed(plain.pooled, far.pooled, style)
    return Condition(mixed(plain.context, far.context, style), pooled)


def mixed(plain: Tensor, far: Tensor, style: Style) -> Tensor:
    """Return what lies between two outputs, [..., width]: on the line, or by `Style.slerp` on the arc."""
    if not style.slerp:
        return plain.lerp(far, style.weight)
    lengths = [vector_norm(one, dim=-1, keepdim=True) for one in (plain, far)]
    cosine = (plain * far).sum(-1, keepdim=True) / (lengths[0] * lengths[1]).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    below = torch.sin(angle)
    near, away = (torch.sin(part * angle) / below for part in (1 - style.weight, style.weight))
    return torch.where(below.abs() < 1e-6, plain.lerp(far, style.weight), near * plain + away * far)


def read_style(path: Path) -> Tensor:
    """Return an aesthetic embedding, [width] float32.

    Raises:
        sdformats.errors.FormatError: the file cannot be read, or holds something else.
        sdmerge.errors.NonFiniteInput: it holds NaN or infinity.
    """
    with open_source(path) as source:
        shapes = [spec.shape for spec in source.specs.values()]
        if len(shapes) != 1 or len(shapes[0]) not in (1, 2) or (len(shapes[0]) == 2 and shapes[0][0] != 1):
            raise FormatError("is no aesthetic embedding", path=path, expected="one tensor, [width] or [1, width]")
        return finite(read_aesthetic(source).vector, path).reshape(-1)
