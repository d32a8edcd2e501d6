"""Small adapters for tests: tensors by name as tools write them, saved and opened again."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdformats.adapters import open_adapter
from sdformats.adapters.layouts import _slots
from sdformats.errors import FormatError
from sdformats.files import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.layout import AdapterLayout

Tensors = dict[str, "Tensor"]
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048, "sdxl-refiner": 1280}
"""How wide the text is that cross-attention reads."""


def noise(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """Return numbers of which none is zero."""
    values = np.random.default_rng([seed, *shape]).uniform(0.25, 1.0, shape)
    return torch.from_numpy(values * np.where(values > 0.6, -1, 1)).to(dtype)


def pair(
    module: str,
    *,
    out: int = 4,
    inner: int = 4,
    rank: int = 2,
    kernel: tuple[int, int] | None = None,
    alpha: float | None = None,
    ends: tuple[str, str] = KOHYA,
) -> Tensors:
    """Return the factors of a LoRA by their names, and alpha where it is given."""
    beyond = () if kernel is None else kernel
    found = {
        f"{module}.{ends[0]}": noise(rank, inner, *beyond),
        f"{module}.{ends[1]}": noise(out, rank, *(1,) * len(beyond)),
    }
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha, dtype=torch.float16)}


def pairs(*modules: str, **options: Any) -> Tensors:
    """Return `pair` of several modules."""
    return {name: tensor for module in modules for name, tensor in pair(module, **options).items()}


def numbered(width: int = 768, size: int = 4, geglu: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return up and down of all attention layers of a UNet, and GEGLU's, in cloneofsimo's order."""
    found = []
    for path in _slots.unet_modules(geglu=geglu):
        out = 8 * size if path.endswith("ff.net.0.proj") else size
        inner = width if path.endswith(("attn2.to_k", "attn2.to_v")) else size
        found.append((noise(out, 1, seed=len(found)), noise(1, inner, seed=len(found))))
    return found


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def save_list(path: Path, items: Sequence[tuple[Tensor, Tensor]]) -> Path:
    """Write a pickled list of ups and downs in turn."""
    torch.save([tensor for both in items for tensor in both], path)
    return path


def save_peft(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write a folder of PEFT's; its settings are rank 2 and alpha 2 where nothing else is given."""
    save(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def opened(path: Path, config: Path | None = None) -> Iterator[tuple[Adapter, AdapterLayout]]:
    """Open an adapter, whose tensors can be read inside."""
    with open_source(path) as source:
        yield open_adapter(source, config)


def read(path: Path, config: Path | None = None) -> tuple[Adapter, AdapterLayout]:
    """Return an adapter whose tensors are not needed any more."""
    with opened(path, config) as found:
        return found


def refusal(path: Path, kind: type[FormatError] = FormatError) -> str:
    """Return the error that reading a file gives, which is one line and names the file."""
    with pytest.raises(kind) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text
