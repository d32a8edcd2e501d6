"""``sdmerge layouts``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import screen

if TYPE_CHECKING:
    from sdformats.adapters.layout import AdapterLayout
    from sdformats.embeddings.layout import EmbeddingLayout

_ENDINGS = {"safetensors": ".safetensors", "torch": ".pt/.bin", "png": ".png", "folder": "folder"}
_ALPHA = {"tensor": "beside the factors", "metadata": "in metadata or a config", "none": "always 1"}


@click.command("layouts")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each layout.")
def layouts(as_json: bool) -> None:
    """List the layouts of adapters and embeddings, and what they can hold."""
    from sdformats.adapters.layouts import LAYOUTS as ADAPTERS
    from sdformats.embeddings.layouts import LAYOUTS as EMBEDDINGS

    if as_json:
        screen.json([*map(_described, ADAPTERS), *map(_described_embedding, EMBEDDINGS)])
        return
    rows = [
        (one.name, one.title, "yes" if one.write else "no", ", ".join(one.families) or "all", _holds(one), one.read_by)
        for one in ADAPTERS
    ]
    screen.table("adapters", ("layout", "what it is", "written", "families", "holds", "read by"), rows)
    embeddings = [(one.name, one.title, _written(one), _families(one), _words(one), one.read_by) for one in EMBEDDINGS]
    screen.table("embeddings", ("layout", "what it is", "written", "families", "holds", "read by"), embeddings)


def _holds(layout: AdapterLayout) -> str:
    return ", ".join(sorted(layout.holds)) + f"; scale {_ALPHA[layout.alpha]}"


def _described(layout: AdapterLayout) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "name": layout.name,
        "title": layout.title,
        "written_by": layout.written_by,
        "read_by": layout.read_by,
        "holds": sorted(layout.holds),
        "alpha": layout.alpha,
        "families": list(layout.families),
        "reads": True,
        "writes": layout.write is not None,
    }


def _written(layout: EmbeddingLayout) -> str:
    return ", ".join(_ENDINGS[container] for container in layout.containers) or f"no: {layout.unwritten}"


def _families(layout: EmbeddingLayout) -> str:
    from sdformats.embeddings.embedding import FAMILIES

    return ", ".join(dict.fromkeys(FAMILIES[one] for one in FAMILIES if one in layout.encoders)) or "all"


def _words(layout: EmbeddingLayout) -> str:
    held = ["words with their names" if layout.names else "a word called like the file"]
    return ", ".join([*held, *(["vectors behind the text encoder"] if layout.outputs else [])])


def _described_embedding(layout: EmbeddingLayout) -> dict[str, Any]:
    return {
        "kind": "embedding",
        "name": layout.name,
        "title": layout.title,
        "written_by": layout.written_by,
        "read_by": layout.read_by,
        "containers": list(layout.containers),
        "encoders": sorted(sorted(one) for one in layout.encoders),
        "several_words": layout.several,
        "names": layout.names,
        "reads": True,
        "writes": layout.write is not None,
        "unwritten": layout.unwritten or None,
    }
