"""What ``sdmerge inspect`` says about each kind of file beyond its tensors: one function each, found by the kind."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from sdformats import aesthetic, clip_inversion, dreamartist, hypernetwork, null_text
from sdformats.custom_diffusion.delta import describe as describe_delta
from sdformats.embeddings.describe import describe as describe_embedding
from sdformats.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sdformats.tensor import TensorSource

DESCRIBERS: Mapping[str, Callable[[TensorSource], dict[str, Any]]] = {
    "embedding": describe_embedding,
    "hypernetwork": hypernetwork.describe,
    "aesthetic": aesthetic.describe,
    "custom-diffusion": describe_delta,
    "null-text": null_text.describe,
    "clip-inversion": clip_inversion.describe,
}
"""By kind; adapters have more to say, see `adapter_details`."""


def details(kind: str, source: TensorSource) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what there is to say about a small file, and what a user should know.

    Args:
        kind: what it is, as `sdformats.kinds` names it.
        source: the file, open.
    """
    if kind not in DESCRIBERS:
        return None, []
    try:
        found = DESCRIBERS[kind](source)
    except FormatError as error:
        return None, [str(error)]
    notes = found.pop("notes", [])
    pair = dreamartist.note(source.path) if kind == "embedding" else None
    return found, notes if pair is None else [*notes, pair]


def adapter_details(source: TensorSource, warnings: Sequence[str], family: str | None) -> dict[str, Any]:
    """Say what an adapter changes, and how."""
    from sdformats.adapters import open_adapter

    try:
        adapter, layout = open_adapter(source)
    except FormatError as error:
        return {"warnings": [*warnings, str(error)]}
    records = adapter.modules
    ranks = [record.rank for record in records.values() if record.rank is not None]
    alphas = [record.scale * record.rank for record in records.values() if record.rank is not None]
    parameters: Counter[str] = Counter()
    for path, record in records.items():
        parameters[path.partition(".")[0]] += sum(ref.spec.numel for _, ref in record.refs)
    return {
        "family": family or adapter.family,
        "layout": layout.name,
        "components": dict(parameters),
        "algorithms": list(adapter.algorithms),
        "ranks": _spread(ranks),
        "alphas": _spread(alphas) if adapter.scaled else None,
        "modules": len(records),
        "blocks": _blocks(records, family or adapter.family),
        "embeddings": list(adapter.embeddings),
        "warnings": [*warnings, *(note for note in adapter.notes if note not in warnings)],
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": median(values), "max": max(values)}


def _blocks(paths: Iterable[str], family: str | None) -> dict[str, int]:
    """Count the modules in each block of the network, and in the text encoders."""
    from sdmerge.block_tables import table

    known = table(family) if family is not None else None
    counts: Counter[str] = Counter()
    for path in paths:
        component, _, rest = path.partition(".")
        inside = component == "unet" and known is not None
        prefix = "transformer." if family in ("sd3", "flux") else "unet."
        counts[known.block_of(f"{prefix}{rest}.weight") if inside and known is not None else component] += 1
    order = {block: i for i, block in enumerate(known.blocks)} if known is not None else {}
    return {block: counts[block] for block in sorted(counts, key=lambda block: (order.get(block, -1), block))}
