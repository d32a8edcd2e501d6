"""What ``sdmerge inspect`` finds out about a file, from its structure alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.files import open_source
from sdformats.layout import component_of, detect
from sdmerge.details import adapter_details, details

if TYPE_CHECKING:
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.arguments import PathLike


def inspect_path(
    path: PathLike, *, family: str | None = None, kind: str | None = None, tensors: bool = False
) -> dict[str, Any]:
    """Say what a model file is and holds. Reads headers only, however large the file.

    Args:
        path: a file or folder.
        family: overrides what the structure tells.
        kind: what it is, where it could be several things.
        tensors: list every tensor too.

    Returns:
        ``path, container, kind, family, variant, layout, components, tensors, parameters, dtypes, bytes, metadata,
        warnings``, ready for JSON; ``components`` and ``dtypes`` are objects with parameters or tensors in each; with
        `tensors` also ``list``, of objects with ``name, dtype, shape``. Of what is no model of its own also ``title``, its kind
        in words, ``readings``, the kinds that it could be: more than one where ``kind`` is ``ambiguous``, and ``details``: an
        object as the kind's ``describe`` returns it, null where there is no more to say. Of an adapter instead of details
        ``algorithms``, ``ranks`` and ``alphas`` (objects with ``min, median, max``; alpha is rank where there is none; null
        where the scale is not known),
        ``modules`` (how many), ``blocks`` (modules in each), ``embeddings``.

    Raises:
        FormatError: the file is no model, broken or unsafe.
    """
    with open_source(Path(path)) as source:
        seen = detect(source.specs, metadata=source.metadata, family=family, kind=kind)
        found = _describe(str(path), source, seen)
        if seen.kind == "adapter":
            found |= adapter_details(source, found["warnings"], family)
        elif seen.readings:
            found["details"], notes = details(seen.kind, source)
            found["warnings"] += notes
        if tensors:
            found["list"] = [
                {"name": name, "dtype": str(spec.dtype), "shape": list(spec.shape)}
                for name, spec in source.specs.items()
            ]
        return found


def _describe(path: str, source: TensorSource, seen: Detection) -> dict[str, Any]:
    dtypes = Counter(str(spec.dtype) for spec in source.specs.values())
    titles = [reading.title for reading in seen.readings]
    found = {
        "path": path,
        "container": source.container,
        "kind": seen.kind,
        "family": seen.family,
        "variant": seen.variant,
        "layout": seen.spelling,
        "components": _components(source, seen),
        "tensors": len(source.specs),
        "parameters": sum(spec.numel for spec in source.specs.values()),
        "dtypes": dict(sorted(dtypes.items())),
        "bytes": sum(file.size for file in source.files),
        "metadata": dict(source.metadata),
        "warnings": [*seen.warnings, *source.notes],
    }
    if titles:
        found |= {"title": " or ".join(titles), "readings": [reading.kind for reading in seen.readings]}
    return found


def _components(source: TensorSource, seen: Detection) -> dict[str, int]:
    """Count the parameters of each part. A part alone is named by what it is."""
    if len(seen.components) == 1:
        return {seen.components[0]: sum(spec.numel for spec in source.specs.values())}
    counts: Counter[str] = Counter()
    for name, spec in source.specs.items():
        counts[component_of(name, seen.spelling)] += spec.numel
    if not seen.components:
        return {}
    return {part: counts[part] for part in (*seen.components, "other") if counts[part]}
