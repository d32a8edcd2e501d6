"""The neutral adapter: what is trained for which module, however a file spells it. Records, no arithmetic.

Modules are named as diffusers does, behind their component: ``unet.down_blocks.0.attentions.0.proj_in`` (the transformers
of SD3 and Flux are ``unet`` too), ``te1.text_model.encoder.layers.0.mlp.fc1`` (CLIP-L, or the only text encoder of SD1 and
SD2), ``te2.`` (CLIP-G), ``te3.encoder.block.0.layer.0.SelfAttention.q`` (T5). A matrix is (out, in); a convolution
(out, in, kh, kw).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdformats.adapters.records import labels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.record import Record
    from sdformats.views import Ref

COMPONENTS = ("unet", "te1", "te2", "te3")


@dataclass(frozen=True)
class Adapter:
    """Everything that a file changes in a model.

    Attributes:
        modules: record by module path, in the order of the file.
        embeddings: words that come along: name, and tensors by the encoder's key (``*``, ``clip_l``, ``clip_g``).
        metadata: texts beside the tensors.
        family: what it is for, where that shows.
        scaled: False where the file does not tell its scales, so that alpha None means nothing.
        notes: what a user should know about how it was read.
    """

    modules: Mapping[str, Record]
    embeddings: Mapping[str, Mapping[str, Ref]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    scaled: bool = True
    notes: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of a model that it changes."""
        there = {path.partition(".")[0] for path in self.modules}
        return tuple(name for name in COMPONENTS if name in there)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms, with ``locon`` for convolutions' LoRA, ``tucker``, ``boft`` and ``dora`` told apart."""
        found = {name for record in self.modules.values() for name in labels(record)}
        return tuple(sorted(found))
