"""What tests of converted models share: what is in a folder, and whether it is what it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "sd3.5", "flux")


def everything(folder: Path) -> Tensors:
    """Return every tensor of a folder, read by the reference library, as ``component.key``, CLIP's with ``text_model.``."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        component = "sdmerge_extras" if file.parent == folder else file.parent.name
        for name, value in load_file(file).items():
            flat = component.startswith("text_encoder") and name.startswith(
                ("embeddings.", "encoder.layers.", "final_")
            )
            found[f"{component}.{'text_model.' if flat else ''}{name}"] = value
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(bits(one[name]), bits(other[name])) for name in one
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def config_of(folder: Path, component: str) -> dict[str, Any]:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    found: dict[str, Any] = json.loads((folder / component / name).read_text())
    return found
