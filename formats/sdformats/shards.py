"""Large components in several files, with an index that says which tensor is where, as the hub's libraries write them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdformats.folder_sink import component_place
from sdformats.keymap import EXTRAS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import Spec


class Shards:
    """Where each tensor of a folder goes.

    A component that is larger than a shard may be is cut between tensors, in their order; a tensor that is larger by itself
    has a shard of its own.

    Args:
        specs: the folder's tensors, ``component.key``.
        limit: bytes of tensors in a shard, at most.

    Attributes:
        texts: the indices, by file name.
    """

    def __init__(self, specs: Mapping[str, Spec], limit: int) -> None:
        self._places: dict[str, tuple[str, str]] = {}
        self.texts: dict[str, str] = {}
        files: dict[str, list[str]] = {}
        for name in specs:
            files.setdefault(component_place(name)[0], []).append(name)
        for file, names in files.items():
            shards = [names] if file == EXTRAS_FILE else _cut(names, specs, limit)
            stem = file.removesuffix(".safetensors")
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(shards, start=1):
                place = file if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
                for name in shard:
                    key = component_place(name)[1]
                    self._places[name] = (place, key)
                    weight_map[key] = place.rpartition("/")[2]
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(specs[name].nbytes for name in names)},
                    "weight_map": weight_map,
                }
                self.texts[f"{file}.index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"

    def __call__(self, name: str) -> tuple[str, str]:
        """Return a tensor's file inside the folder, and its name there."""
        return self._places[name]


def _cut(names: list[str], specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = specs[name].nbytes
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
