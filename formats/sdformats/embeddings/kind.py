"""How an embedding is known, and in which layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks

_MOST_TENSORS, _MOST_NUMBERS = 64, 1280 * 256
_FAMILIES = {
    frozenset({768}): "sd1",
    frozenset({1024}): "sd2",
    frozenset({768, 1280}): "sdxl",
    frozenset({768, 1280, 4096}): "sd3",
    frozenset({768, 4096}): "flux",
}


def _family(looks: Looks) -> str | None:
    return _FAMILIES.get(looks.widths)


def _vectors(looks: Looks) -> bool:
    """Few tensors, each a vector or a list of them."""
    return 0 < len(looks.floats) <= _MOST_TENSORS and all(
        1 <= len(spec.shape) <= 2 and spec.numel <= _MOST_NUMBERS for spec in looks.floats.values()
    )


def _lone(looks: Looks) -> bool:
    return _vectors(looks) and len(looks.specs) == 1 and looks.widths <= {768, 1024, 1280}


KIND = Kind(
    name="embedding",
    title="a textual-inversion embedding",
    layouts=(
        Marked(name="a1111", marks=(r"^string_to_(param|token)\.",), needs=(r"^string_to_param\.",), fits=_vectors),
        Marked(name="kohya", marks=(r"^emb_params$",), fits=_vectors),
        Marked(name="onetrainer", marks=(r"^emp_params$",), fits=_vectors),
        Marked(name="encoders", marks=(r"^(clip_l|clip_g|t5|t5xxl)$",), fits=_vectors),
        Marked(name="pairs", marks=(r"^(\d+\.)?emb2?$",), fits=_vectors),
        Marked(name="diffusers", marks=(r"^<.*>$", r"^\*$"), fits=_vectors),
        Marked(
            name="one-word",
            marks=(r"^(?!(emb_params|emp_params|clip_[lg]|clip_image|t5|t5xxl|emb2?|head|embed|\*|<.*>)$)[^.]+$",),
            fits=_lone,
        ),
        Marked(name="bare", marks=(r"^$",), fits=_lone),
    ),
    family=_family,
)
