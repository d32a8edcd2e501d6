"""Merging files that are no models: what must be alike, and what the result holds beside its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats import hypernetwork
from sdmerge.errors import MismatchError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.layout import Written
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.recipe import Recipe

    Opened = tuple[TensorSource, Detection]


def merged_small(opened: Mapping[str, Opened], recipe: Recipe) -> Written | None:
    """Return the settings and the tree of what a merge of hypernetworks makes; None where none is among its inputs.

    The settings are A's.

    Raises:
        RequestError: the recipe takes apart what has no blocks, or one input is something else.
        MismatchError: the networks are built differently.
    """
    kinds = {seen.kind for _, seen in opened.values()}
    if "hypernetwork" not in kinds:
        return None
    if len(kinds) > 1:
        raise RequestError(
            "a hypernetwork can be merged with hypernetworks only (to put one into a model: sdmerge bake)"
        )
    if recipe.differs:
        raise RequestError("a hypernetwork has no blocks, and its weights cannot differ from tensor to tensor")
    records = {label: hypernetwork.read_hypernetwork(source) for label, (source, _) in opened.items()}
    (first_label, first), *others = records.items()
    for label, other in others:
        if _built(other) != _built(first):
            raise MismatchError(
                f"{opened[label][0].path}: is built otherwise than {first_label} ({_built(other)}; expected {_built(first)})"
            )
    writer = hypernetwork.WRITERS[opened[first_label][1].spelling or "a1111"]
    return writer(replace(first, extras={}))


def _built(record: hypernetwork.Hypernetwork) -> str:
    """Say how a hypernetwork is built, in words that are the same for equal structures."""
    settings = record.settings
    slots = " ".join(kind for kind, _ in settings.slots())
    layers = ", ".join(f"{size:g}" for size in settings.layer_structure)
    bend = f", {settings.activation}" if settings.activation else ""
    return f"widths {', '.join(map(str, sorted(record.networks)))}; layers {layers}; {slots}{bend}"
