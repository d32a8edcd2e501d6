"""Models that are merged in memory and never written: a sink that is read as a source afterwards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.tensor import TensorSink, TensorSource
from sdmerge.execute import planned, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sdformats.tensor import Spec
    from sdmerge.options import Options
    from sdmerge.recipe import Recipe


class Memory(TensorSource):
    """Tensors in memory. Its `sink` fills it.

    Args:
        path: what it is called.
    """

    container = "memory"
    files = ()

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self.specs, self.metadata = path, specs, metadata
        self.data = {name: bytearray(spec.nbytes) for name, spec in specs.items()}
        self._order = {name: index for index, name in enumerate(specs)}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self.data[name])[offset : offset + len(buffer)]

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._order[name]


class MemorySink(TensorSink):
    """Fills a `Memory`."""

    def __init__(self, memory: Memory) -> None:
        self.path, self._memory = memory.path, memory

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        flat = buffer.cast("B")
        self._memory.data[name][offset : offset + len(flat)] = flat

    def commit(self) -> None:
        """See `TensorSink.commit`."""

    def abort(self) -> None:
        """See `TensorSink.abort`."""


def merged(recipes: Sequence[Recipe], options: Options) -> Iterator[Memory]:
    """Carry out recipes over the same inputs, one after the other, each into memory.

    Raises:
        sdformats.errors.FormatError: a file cannot be read.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    from sdmerge.run import run

    with ExitStack() as stack:
        plans, *_ = planned(stack, recipes, options)
        for plan in plans:
            made = Memory(plan.sources[0].path, plan.specs, plan.sources[0].metadata)
            with shown(options, "merging", plan.cost) as advance, MemorySink(made) as sink:
                run([(plan, sink)], replace(options, dry_run=False), advance)
            for source in plan.sources:
                source.verify()
            yield made
