"""A picture of the rank of every layer and the energy that it keeps, in the order of the model."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ORDER = (
    *("te1", "te2", "te3", "unet.conv_in", "unet.pos_embed", "unet.x_embedder", "unet.context_embedder", "unet.time"),
    *(
        "unet.add",
        "unet.down",
        "unet.mid",
        "unet.up",
        "unet.transformer_blocks",
        "unet.single_transformer_blocks",
        "unet",
    ),
)
_BLOCK = re.compile(r"(unet\.(?:down_blocks|up_blocks)\.\d+|unet\.mid_block|unet\.(?:single_)?transformer_blocks|te\d)")
_LABELS = {"unet.transformer_blocks": "transformer blocks", "unet.single_transformer_blocks": "single blocks"}


def painted(layers: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the picture as a PNG file.

    Args:
        layers: ``rank`` and ``energy`` of each layer by its name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = in_order(layers)
    blocks = [match[1] if (match := _BLOCK.match(name)) else name.partition(".")[0] for name in names]
    edges = [i for i in range(len(names)) if i == 0 or blocks[i] != blocks[i - 1]]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    x = range(len(names))
    axes[0].bar(x, [layers[name]["rank"] for name in names], width=1.0, color="#4477aa")
    axes[0].set_ylabel("rank")
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].bar(x, [100 * layers[name]["energy"] for name in names], width=1.0, color="#66aa55")
    axes[1].set_ylabel("energy kept, %")
    axes[1].set_ylim(0, 100)
    for axis in axes:
        axis.set_xlim(-0.5, max(len(names), 1) - 0.5)
        for edge in edges[1:]:
            axis.axvline(edge - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
    middles = [(a + b) / 2 - 0.5 for a, b in pairwise([*edges, len(names)])]
    axes[1].set_xticks(middles, [_short(blocks[edge]) for edge in edges], rotation=40, ha="right")
    axes[0].set_title(f"{len(names):,} layers")
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    return data.getvalue()


def in_order(names: Iterable[str]) -> list[str]:
    """Return layers in the order in which a model computes them, block by block."""
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, int]:
    """Return where a layer is in the order of the work; layers of one block stay in their order."""
    first = next((i for i, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))
    number = re.search(r"_blocks\.(\d+)", name)
    return first, int(number[1]) if number else 0


def _short(block: str) -> str:
    return _LABELS.get(block) or block.removeprefix("unet.").replace("_blocks.", " ").replace("_block", "")
