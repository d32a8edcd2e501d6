"""Write a hypernetwork as A1111 or NovelAI does."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.hypernetwork.record import Hypernetwork, Linear, Norm, Settings
from sdformats.torch_pickle import TensorNamed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.torch_pickle import Tree
    from sdformats.views import Ref


def write_a1111(record: Hypernetwork) -> Written:
    """Return A1111's tensors, settings and tree. All settings are written: readers disagree about what a missing one means."""
    settings = {item.name: getattr(record.settings, item.name) for item in fields(Settings)}
    settings["dropout_structure"] = record.settings.dropouts
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return _written(record, "linear.{}", {**record.extras, **texts}, {**record.extras, **settings})


def write_novelai(record: Hypernetwork) -> Written:
    """Return NovelAI's tensors and tree.

    Raises:
        CannotHold: it is no pair of linear layers of twice the width.
    """
    plain = [kind for kind, _ in record.settings.slots() if kind != "dropout"] == ["linear", "linear"]
    if not plain or record.settings.layer_structure != (1, 2, 1):
        raise CannotHold(
            "the layout novelai holds two linear layers with nothing between them, the first of twice the width",
            advice="choose --to a1111",
        )
    return _written(record, "linear{}", {}, {})


def _written(record: Hypernetwork, form: str, texts: Mapping[str, str], beside: Mapping[str, Tree]) -> Written:
    tensors: dict[str, Ref] = {}
    tree: dict[Any, Tree] = {}
    numbered = form == "linear.{}"
    for width, pair in record.networks.items():
        sides: list[Tree] = []
        for side, network in enumerate(pair):
            inner: dict[str, Tree] = {}
            placed = enumerate(network) if numbered else enumerate((s for s in network if isinstance(s, Linear)), 1)
            for index, slot in placed:
                if not isinstance(slot, Linear | Norm):
                    continue
                for part, ref in (("weight", slot.weight), ("bias", slot.bias)):
                    key = f"{form.format(index)}.{part}"
                    name = f"{width}.{side}.{key}"
                    tensors[name] = ref
                    inner[key] = TensorNamed(name)
            sides.append(inner)
        tree[width] = tuple(sides)
    return Written(tensors, texts, tree={**tree, **beside})


WRITERS: Mapping[str, Callable[[Hypernetwork], Written]] = {"a1111": write_a1111, "novelai": write_novelai}
"""By layout; both go into a file for torch or into safetensors."""
