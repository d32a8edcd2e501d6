"""Small files put into networks in memory: hypernetworks that are not linear, and Custom Diffusion's deltas with their words.

No model's weights can hold all of them, so they cannot be baked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdformats.custom_diffusion.delta import Product, read_custom_diffusion
from sdformats.files import open_source
from sdformats.hypernetwork import read_hypernetwork
from sdformats.layout import detect
from sdmerge.errors import MismatchError
from sdmerge.lora.refs import value
from sdmerge.train.hypernetwork_layers import attach, in_memory

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.tensor import TensorSource
    from sdmerge.train.networks import Networks


def stands_beside(path: Path) -> bool:
    """Whether a file is one of these; all others are baked.

    Raises:
        sdformats.errors.FormatError: it cannot be read.
    """
    with open_source(path) as source:
        kind = detect(source.specs, metadata=source.metadata).kind
        return kind == "custom-diffusion" or (kind == "hypernetwork" and read_hypernetwork(source).bends is not None)


def put(networks: Networks, path: Path, strength: float) -> None:
    """Let networks compute with such a file.

    Raises:
        MismatchError: it is for another model.
        sdformats.errors.FormatError: it cannot be read.
    """
    with open_source(path) as source:
        if detect(source.specs, metadata=source.metadata).kind == "hypernetwork":
            attach(networks.unet, in_memory(read_hypernetwork(source)), strength)
        else:
            _delta(networks, source, strength)


@torch.no_grad()
def _delta(networks: Networks, source: TensorSource, strength: float) -> None:
    """Move weights toward those of a delta, and add its words."""
    delta = read_custom_diffusion(source)
    known = dict(networks.unet.named_parameters())
    for name, ref in delta.weights.items():
        made = value(ref.up) @ value(ref.down) if isinstance(ref, Product) else value(ref)
        if name not in known or known[name].shape != made.shape:
            raise MismatchError(f"{source.path}: {name!r} has no place in the model (expected a delta for its family)")
        weight = known[name]
        weight += strength * (made if isinstance(ref, Product) else made - weight).to(weight)
    for word, vectors in delta.words.items():
        for text, vector in zip(networks.texts, vectors, strict=False):
            text.add_word(word, value(vector).reshape(-1, vector.shape[-1]).to(text.table.weight))  # type: ignore[arg-type]
