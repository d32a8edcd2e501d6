"""Full-size checkpoints to measure with: random, seeded, written once into a cache folder.

The three files of a family look like fine-tunes of one base: the same base weights (standard deviation 0.02,
norm weights around 1) plus changes of their own (standard deviation 0.001), one autoencoder for all.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from sdformats.errors import FormatError
from sdformats.safetensors import SafetensorsSink, SafetensorsSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.shapes import Family
    from sdformats.tensor import Spec

MODELS = ("a", "b", "c")
BASE_DEVIATION = 0.02
CHANGE_DEVIATION = 0.001
_VERSION = "1"
_POOL = 1 << 23
_CHUNK = 1 << 20


class Noise:
    """Normal numbers in any amount, cheaply: slices of one pool at seeded places.

    Drawing every number of three SDXL files would take minutes and change nothing that is measured.
    """

    def __init__(self, pool: int = _POOL) -> None:
        generator = np.random.Generator(np.random.Philox(20_240_101))
        self._pool = generator.standard_normal(pool, dtype=np.float32)

    def take(self, count: int, *seed: int) -> NDArray[np.float32]:
        """Return `count` numbers (at most the pool's size): the same for the same seed."""
        start = np.random.default_rng(seed).integers(len(self._pool) - count + 1)
        return self._pool[start : start + count]


def model_files(
    family: Family,
    folder: Path,
    *,
    report: Callable[[str], None] = lambda _: None,
    noise: Noise | None = None,
    models: Sequence[str] = MODELS,
) -> tuple[Path, ...]:
    """Return the three files of a family, in the order A, B, C, or some of them; write those that are not there yet.

    Args:
        family: what to write.
        folder: where; made if it is missing.
        report: told each file that has to be written.
        noise: where the numbers come from.
        models: which of the three.

    Raises:
        WriteError: the folder has too little room or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = family.specs()
    paths = {model: folder / f"{family.name}-{model}.safetensors" for model in models}
    missing = [model for model, path in paths.items() if not _is_current(path, specs)]
    if missing:
        noise = noise or Noise()
    for model in missing:
        assert noise is not None
        report(f"writing {paths[model].name} ({sum(spec.nbytes for spec in specs.values()) / 1e9:.1f} GB)")
        _write(paths[model], specs, MODELS.index(model), noise)
    return tuple(paths.values())


def tuned_file(family: Family, base: Path, *, report: Callable[[str], None] = lambda _: None) -> Path:
    """Return a fine-tune of a file, beside it; write it where it is not there.

    Every matrix and convolution of the networks and text encoders is changed by a product whose singular values fall off
    like 1 / √i, up to the 192nd, by a twentieth of the weights' norm; what is beyond that is rounding.
    """
    path = base.with_name(f"{family.name}-tuned.safetensors")
    specs = family.specs()
    if _is_current(path, specs):
        return path
    report(f"writing {path.name} ({sum(spec.nbytes for spec in specs.values()) / 1e9:.1f} GB)")
    noise = Noise()
    metadata = {"format": "pt", "sdmerge.bench": _VERSION}
    with SafetensorsSource(base) as source, SafetensorsSink(path, specs, metadata, overwrite=True) as sink:
        for name, spec in specs.items():
            data = source.read(name)
            if len(spec.shape) > 1 and not name.startswith("first_stage_model.") and "embedding" not in name:
                weights = np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(spec.shape[0], -1)
                data = bytearray((weights + _change(name, weights, noise)).astype("<f2").tobytes())
            sink.write(name, 0, memoryview(data))
    return path


def _change(name: str, weights: NDArray[np.float32], noise: Noise) -> NDArray[np.float32]:
    (rows, columns), seed = weights.shape, zlib.crc32(name.encode())
    rank = min(rows, columns, 192)
    up = noise.take(rows * rank, seed, 101).reshape(rows, rank) / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))
    change = up @ noise.take(rank * columns, seed, 102).reshape(rank, columns)
    return np.asarray(change * (0.05 * np.linalg.norm(weights) / np.linalg.norm(change)), dtype=np.float32)


def _is_current(path: Path, specs: Mapping[str, Spec]) -> bool:
    try:
        with SafetensorsSource(path) as source:
            return source.metadata.get("sdmerge.bench") == _VERSION and dict(source.specs) == specs
    except FormatError:
        return False


def _write(path: Path, specs: Mapping[str, Spec], model: int, noise: Noise) -> None:
    metadata = {"format": "pt", "sdmerge.bench": _VERSION}
    with SafetensorsSink(path, specs, metadata, overwrite=True) as sink:
        for name, spec in specs.items():
            if not spec.dtype.is_float:
                sink.write(name, 0, np.arange(spec.numel, dtype="<i8").data.cast("B"))
                continue
            for start in range(0, spec.numel, _CHUNK):
                sink.write(name, 2 * start, _weights(name, spec, model, start, noise).data.cast("B"))


def _weights(name: str, spec: Spec, model: int, start: int, noise: Noise) -> NDArray[np.float16]:
    """Return the chunk of a tensor that begins at element `start`."""
    count = min(_CHUNK, spec.numel - start)
    key = zlib.crc32(name.encode())
    values = BASE_DEVIATION * noise.take(count, key, start)
    if len(spec.shape) == 1 and name.endswith(".weight"):  # only norms have weights of rank 1
        values += 1
    if not name.startswith("first_stage_model."):
        values += CHANGE_DEVIATION * noise.take(count, key, start, model + 1)
    return values.astype("<f2")
