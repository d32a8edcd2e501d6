"""Every kind of file that is no model of its own, and what a file may be of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.kind import KIND as ADAPTER
from sdformats.aesthetic import KIND as AESTHETIC
from sdformats.clip_inversion import KIND as CLIP_INVERSION
from sdformats.controlnet import KIND as CONTROLNET
from sdformats.custom_diffusion.kind import KIND as CUSTOM_DIFFUSION
from sdformats.embeddings.kind import KIND as EMBEDDING
from sdformats.hypernetwork import KIND as HYPERNETWORK
from sdformats.inpaint_head import KIND as INPAINT_HEAD
from sdformats.kind import Looks
from sdformats.null_text import KIND as NULL_TEXT
from sdformats.optimizer_state import KIND as OPTIMIZER_STATE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.kind import Reading
    from sdformats.tensor import Spec

KINDS = (
    ADAPTER,
    EMBEDDING,
    HYPERNETWORK,
    AESTHETIC,
    CUSTOM_DIFFUSION,
    NULL_TEXT,
    CLIP_INVERSION,
    CONTROLNET,
    INPAINT_HEAD,
    OPTIMIZER_STATE,
)
"""In the order in which people see them."""


def readings_of(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[Reading, ...]:
    """Return what a set of tensors may be: nothing, one reading, or several that fit equally well.

    Raises:
        FormatError: two layouts of one kind fit equally well.
    """
    looks = Looks(specs, metadata)
    found = [reading for kind in KINDS if (reading := kind.read(looks)) is not None]
    best = max((score for score, _ in found), default=0)
    return tuple(reading for score, reading in found if score == best)
