"""A full-size adapter to measure with: a LoRA as sd-scripts writes it, random, fp16, written once into a cache folder."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.model_files import Noise
from sdformats.safetensors import SafetensorsSink
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from benchmarks.shapes import Family

_UNET = "model.diffusion_model."
_TEXT_ENCODERS = {"conditioner.embedders.0.transformer.": "lora_te1_", "cond_stage_model.transformer.": "lora_te_"}
_LEFT_OUT = re.compile(r"time_embed|label_emb|\.emb_layers\.|\.0\.0\.weight$|\.out\.")
_DEVIATION = 0.02
_CHUNK = 1 << 22


def adapter_file(family: Family, rank: int, cache: Path, *, report: Callable[[str], None], number: int = 0) -> Path:
    """Return the file, and write it first where it is not there.

    Args:
        family: whose network it is for; the first text encoder is in it, too.
        rank: of every layer, convolutions included.
        cache: the folder.
        report: told what is written.
        number: which of several.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{family.name}-lora-r{rank}{f'-{number}' if number else ''}.safetensors"
    if path.exists():
        return path
    specs = dict(tensors_of(family.specs(), rank))
    report(f"writing {path.name}, {sum(spec.nbytes for spec in specs.values()) / 1e9:.2f} GB")
    noise = Noise()
    with SafetensorsSink(path, specs, {"ss_network_dim": str(rank)}) as sink:
        for name, spec in specs.items():
            _write(sink, name, spec, noise, rank, number)
    return path


def _write(sink: SafetensorsSink, name: str, spec: Spec, noise: Noise, rank: int, number: int) -> None:
    if not spec.shape:
        sink.write(name, 0, memoryview(np.float16(rank / 2).tobytes()))
        return
    for start in range(0, spec.numel, _CHUNK):
        count = min(_CHUNK, spec.numel - start)
        values = (noise.take(count, zlib.crc32(name.encode()), start, number) * _DEVIATION).astype("<f2")
        sink.write(name, 2 * start, values.data.cast("B"))


def tensors_of(specs: Mapping[str, Spec], rank: int) -> Iterator[tuple[str, Spec]]:
    """Yield the adapter's tensors for a model of these tensors."""
    for name, spec in specs.items():
        module, shape = _module(name), spec.shape
        if module is None or len(shape) not in (2, 4):
            continue
        kernel = shape[2:]
        yield f"{module}.alpha", Spec((), DType.F16)
        yield f"{module}.lora_down.weight", Spec((rank, shape[1], *kernel), DType.F16)
        yield f"{module}.lora_up.weight", Spec((shape[0], rank, *(1 for _ in kernel)), DType.F16)


def _module(name: str) -> str | None:
    """Return sd-scripts' name for a layer, or None where it is not trained."""
    if not name.endswith(".weight") or _LEFT_OUT.search(name):
        return None
    for prefix, written in ((_UNET, "lora_unet_"), *_TEXT_ENCODERS.items()):
        if name.startswith(prefix) and "embedding" not in name:
            return written + name.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
    return None


def places(adapter: Container[str], model: Iterable[str]) -> dict[str, str]:
    """Return the model's tensor by the adapter's module."""
    found = {module: name for name in model if (module := _module(name)) is not None}
    return {module: name for module, name in found.items() if f"{module}.alpha" in adapter}


def flops(specs: Mapping[str, Spec], rank: int) -> int:
    """Return how many operations it takes to form all changes: two for each element and rank."""
    adapter = dict(tensors_of(specs, rank))
    return sum(2 * specs[name].numel * rank for name in places(adapter, specs).values())
