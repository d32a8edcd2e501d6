"""Layouts of embeddings as values: how they are known, what they can hold, how they are read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdformats.adapters.errors import CannotHold
from sdformats.embeddings.embedding import WIDTHS
from sdformats.kind import Marked

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdformats.adapters.layout import Written
    from sdformats.embeddings.embedding import Embedding
    from sdformats.tensor import TensorSource

Container = Literal["safetensors", "torch", "png", "folder"]
Encoders = frozenset[str]


def sets(*names: str) -> frozenset[Encoders]:
    """Return sets of encoders, each given as names with spaces between them."""
    return frozenset(frozenset(name.split()) for name in names)


ONE = sets("clip_l", "open_clip")
MIXED = sets("clip_l clip_g", "clip_g", "clip_l t5", "clip_l clip_g t5", "t5")


@dataclass(frozen=True, kw_only=True)
class EmbeddingLayout(Marked):
    """A layout.

    Attributes:
        title: one line about it.
        written_by, read_by: programs.
        containers: what it is written into, the usual one first; empty: it is only read.
        unwritten: why it is only read.
        encoders: the sets of encoders for which it has a place in one word.
        several: whether it has a place for more than one word.
        outputs: whether it has a place for vectors behind the text encoders.
        names: whether it has a place for words' tokens.
        read: takes a file.
        write: takes an embedding that it can hold.
    """

    title: str
    written_by: str
    read_by: str
    containers: tuple[Container, ...] = ()
    unwritten: str = ""
    encoders: frozenset[Encoders] = frozenset()
    several: bool = False
    outputs: bool = False
    names: bool = False
    read: Callable[[TensorSource], Embedding]
    write: Callable[[Embedding], Written] | None = None


def check_holds(layout: EmbeddingLayout, embedding: Embedding) -> None:
    """Refuse what a layout has no place for.

    Raises:
        CannotHold: so it is; the message says what, and the way out.
    """
    if layout.write is None:
        raise CannotHold(f"the layout {layout.name} is only read: {layout.unwritten}", advice=_way_out(embedding))
    if len(embedding.words) > 1 and not layout.several:
        names = ", ".join(str(word.token) for word in embedding.words)
        raise CannotHold(
            f"holds {len(embedding.words)} words ({names}), and the layout {layout.name} has a place for one",
            advice=f"take one out with `sdmerge embedding slice --word`; {_way_out(embedding)}",
        )
    for word in embedding.words:
        if word.outputs and not layout.outputs:
            raise CannotHold(
                f"has vectors behind the text encoder, for which the layout {layout.name} has no place",
                key=word.token,
                advice=f"--allow-loss leaves them out; {_way_out(embedding)}",
            )
        if word.encoders not in layout.encoders:
            raise CannotHold(
                f"is for {listed(word.encoders)}, for which the layout {layout.name} has no place",
                key=word.token,
                advice=_way_out(embedding),
            )


def listed(encoders: Encoders) -> str:
    """Name encoders in a fixed order."""
    return " and ".join(name for name in WIDTHS if name in encoders)


def _way_out(embedding: Embedding) -> str:
    """Say which layouts hold all of it."""
    from sdformats.embeddings.layouts import LAYOUTS  # layouts are made of this module's classes

    able = [layout.name for layout in LAYOUTS if layout.write is not None and _holds(layout, embedding)]
    return f"these layouts hold all of it: {', '.join(able)}" if able else "no layout holds all of it"


def _holds(layout: EmbeddingLayout, embedding: Embedding) -> bool:
    words = embedding.words
    if len(words) > 1 and not layout.several:
        return False
    return all(word.encoders in layout.encoders and (layout.outputs or not word.outputs) for word in words)
