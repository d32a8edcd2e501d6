"""Layouts as values: what their names look like, what they can hold, who writes and reads them; and telling them apart.

A layout's `needs` must all be met by some name, its `bars` by none; of those left, the one whose `marks` match the most
names wins, and a tie or nothing is an error that says what was seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sdformats.errors import FormatError

if TYPE_CHECKING:
    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.fused import Fold
    from sdformats.adapters.naming import Naming
    from sdformats.tensor import Spec, TensorSource
    from sdformats.torch_pickle import Tree
    from sdformats.views import Ref

Config = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterFile:
    """A file with an adapter in it.

    Attributes:
        source: its tensors.
        configs: PEFT's ``adapter_config.json`` beside it, by the prefix of the names it is for; empty where there is none.
    """

    source: TensorSource
    configs: Mapping[str, Config] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a layout makes of an adapter or of another small file.

    Attributes:
        tensors: by name, in order.
        metadata: texts beside them.
        texts: files beside the weights, by name; where there are any, the output is a folder, and tensors are
            named ``file/name``.
        tree: how tensors and values are arranged in a file for torch; None: the layout knows none.
    """

    tensors: Mapping[str, Ref]
    metadata: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)
    tree: Tree = None


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """A layout.

    Attributes:
        name: what users call it.
        title: one line about it.
        written_by, read_by: programs.
        holds: algorithms that it has names for, as `records.labels` tells them, and ``bias``, ``embeddings``.
        alpha: where the scale is: a ``tensor``, the ``metadata`` (or a config), or ``none``: then it is 1.
        naming: its names.
        needs, bars, marks: patterns of names; see above.
        families: those it exists for; empty: all.
        read: takes a file; None: `reading.read_named`.
        write: takes an adapter that it can hold; None: it is read only.
        fits: tells by shapes too, where names are not enough.
        keep: metadata that belongs to the layout and is not carried into others, as patterns.
    """

    name: str
    title: str
    written_by: str
    read_by: str
    holds: frozenset[str]
    alpha: Literal["tensor", "metadata", "none"]
    naming: Naming | None = None
    needs: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    marks: tuple[str, ...]
    families: tuple[str, ...] = ()
    read: Callable[[AdapterLayout, AdapterFile], Adapter]
    write: Callable[[AdapterLayout, Adapter, Fold], Written] | None = None
    fits: Callable[[Mapping[str, Spec]], bool] | None = None
    keep: tuple[str, ...] = ()

    def score(self, all_names: str, specs: Mapping[str, Spec]) -> int:
        """Return how many names have a mark; 0 where the layout is out of the question.

        Args:
            all_names: the names, one on each line.
            specs: the tensors by name.
        """
        if not all(re.search(need, all_names, re.MULTILINE) for need in self.needs):
            return 0
        if any(re.search(bar, all_names, re.MULTILINE) for bar in self.bars):
            return 0
        if self.fits is not None and not self.fits(specs):
            return 0
        pattern = re.compile("|".join(self.marks))
        return sum(pattern.search(name) is not None for name in specs)


def detect_adapter(specs: Mapping[str, Spec]) -> AdapterLayout:
    """Say in which layout an adapter is.

    Args:
        specs: its tensors, by name.

    Raises:
        FormatError: none fits, or several do.
    """
    from sdformats.adapters.layouts import LAYOUTS  # layouts are made of this module's classes

    if not specs:
        raise FormatError("holds no tensors", expected="an adapter")
    text = "\n".join(specs)
    scores = [(layout.score(text, specs), layout) for layout in LAYOUTS]
    best = max((score for score, _ in scores), default=0)
    if best == 0:
        raise FormatError(
            f"is no adapter in any known layout; its names begin with {beginnings(specs)}",
            expected="one of those that `sdmerge layouts` lists",
        )
    winners = [layout.name for score, layout in scores if score == best]
    if len(winners) > 1:
        raise FormatError(
            f"could be {' and '.join(winners)}; its names begin with {beginnings(specs)}",
            advice="it may hold two adapters, which belong into two files",
        )
    return next(layout for score, layout in scores if score == best)


def beginnings(names: Mapping[str, object]) -> str:
    """Return the most frequent beginnings of names, for errors."""
    counts = Counter(re.split(r"[._:\d]", name, maxsplit=2)[0][:40] for name in names)
    return ", ".join(f"{start!r} ({count:,})" for start, count in counts.most_common(4))
