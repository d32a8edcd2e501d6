"""A picture of an extraction: the rank and the error of every layer, in the order of the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_ORDER = ("te1", "te2", "te3", "unet.conv_in", "unet.time", "unet.add", "unet.down", "unet.mid", "unet.up", "unet")
_BLOCK = re.compile(r"(unet\.(?:down_blocks|up_blocks)\.\d+|unet\.mid_block|unet\.\w+?_blocks|te\d)")


def paint(path: Path, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the picture as PNG.

    Args:
        path: where.
        layers: ``rank``, ``energy`` and ``error`` of each layer by its name, in order.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    names = sorted(layers, key=_place)
    blocks = [match[1] if (match := _BLOCK.match(name)) else name.partition(".")[0] for name in names]
    edges = [i for i in range(len(names)) if i == 0 or blocks[i] != blocks[i - 1]]
    figure, axes = plt.subplots(2, 1, figsize=(12, 6.5), sharex=True, constrained_layout=True)
    x = range(len(names))
    axes[0].bar(x, [layers[name]["rank"] for name in names], width=1.0, color="#4477aa")
    axes[0].set_ylabel("rank")
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].bar(x, [100 * layers[name]["energy"] for name in names], width=1.0, color="#66aa55")
    axes[1].set_ylabel("energy kept, %")
    axes[1].set_ylim(0, 100)
    for axis in axes:
        axis.set_xlim(-0.5, len(names) - 0.5)
        for edge in edges[1:]:
            axis.axvline(edge - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
    middles = [(a + b) / 2 - 0.5 for a, b in zip(edges, [*edges[1:], len(names)], strict=True)]
    axes[1].set_xticks(middles, [_short(blocks[edge]) for edge in edges], rotation=40, ha="right")
    axes[0].set_title(f"{len(names):,} layers")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _place(name: str) -> tuple[int, int]:
    """Return where a layer is in the order of the work; layers of one block stay in their order."""
    first = next((i for i, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))
    number = re.search(r"_blocks\.(\d+)", name)
    return first, int(number[1]) if number else 0


def _short(block: str) -> str:
    return block.removeprefix("unet.").replace("_blocks.", " ").replace("_block", "")
