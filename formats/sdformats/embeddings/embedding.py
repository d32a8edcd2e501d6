"""The neutral embedding: new words and their vectors, however a file spells them. Records, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.views import Ref

WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5": 4096, "open_clip": 1024, "bert": 1280}
"""Widths of the text encoders' tables: CLIP-L, OpenCLIP-bigG, T5-XXL, OpenCLIP-H (SD2's), LDM's own BERT."""
FAMILIES = {
    frozenset({"clip_l"}): "sd1",
    frozenset({"open_clip"}): "sd2",
    frozenset({"clip_l", "clip_g"}): "sdxl",
    frozenset({"clip_g"}): "sdxl",
    frozenset({"clip_l", "clip_g", "t5"}): "sd3",
    frozenset({"clip_l", "t5"}): "flux",
}
"""What embeddings for a set of encoders are for."""


@dataclass(frozen=True)
class Word:
    """A new word.

    Attributes:
        token: what a prompt calls it; None where the file leaves that to its own name.
        vectors: rows for the tables of text encoders, (n, width), by encoder, in the order of `WIDTHS`.
        outputs: vectors that are put into the text encoders' outputs instead, (n, width), by encoder.
    """

    token: str | None
    vectors: Mapping[str, Ref]
    outputs: Mapping[str, Ref] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vectors", "outputs"):
            given = getattr(self, name)
            object.__setattr__(self, name, {encoder: given[encoder] for encoder in WIDTHS if encoder in given})

    @property
    def encoders(self) -> frozenset[str]:
        """The encoders that it has anything for."""
        return frozenset(self.vectors) | frozenset(self.outputs)

    @property
    def family(self) -> str | None:
        """What it is for; None where its encoders or their widths are of no known family."""
        refs = [*self.vectors.items(), *self.outputs.items()]
        if any(WIDTHS[encoder] != ref.shape[1] for encoder, ref in refs):
            return None
        return FAMILIES.get(self.encoders)


@dataclass(frozen=True)
class Embedding:
    """Everything that a file teaches a text encoder.

    Attributes:
        words: at least one.
        name: what the file calls itself. Files are renamed, so it is often not what people call it.
        step: how many steps it was trained.
        checkpoint, checkpoint_hash: the model that it was trained on.
        trainer: the program that wrote it, where that shows.
        metadata: texts beside it, of the trainer.
        notes: what a user should know about how it was read.
    """

    words: tuple[Word, ...]
    name: str | None = None
    step: int | None = None
    checkpoint: str | None = None
    checkpoint_hash: str | None = None
    trainer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> dict[str, str]:
        """What a file can say beside the vectors: A1111's texts that are known, and the trainer's."""
        said = {
            "name": self.name,
            "step": None if self.step is None else str(self.step),
            "sd_checkpoint": self.checkpoint_hash,
            "sd_checkpoint_name": self.checkpoint,
        }
        return {key: value for key, value in said.items() if value is not None} | dict(self.metadata)

    @property
    def family(self) -> str | None:
        """What it is for; None where nothing tells, or its words disagree."""
        found = {word.family for word in self.words}
        return next(iter(found)) if len(found) == 1 else None


def encoder_of(width: int, wide: str = "clip_g") -> str:
    """Return the encoder whose table has a width; CLIP-L, which every family but SD2 has, for widths of no known one.

    Args:
        width: of the vectors.
        wide: the encoder that 1280 stands for: ``clip_g`` or ``bert``.
    """
    return {768: "clip_l", 1024: "open_clip", 1280: wide, 4096: "t5"}.get(width, "clip_l")
