"""Tensors in memory that are read as those of a file are, and records of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.tensor import DType, Spec, TensorSource
from sdformats.views import Ref, Stored, bits

if TYPE_CHECKING:
    from sdformats.adapters.record import Record

_TYPES = {np.dtype(np.float16): DType.F16, np.dtype(np.float32): DType.F32, np.dtype(np.float64): DType.F64}


class Memory(TensorSource):
    """Arrays by name."""

    container = "memory"

    def __init__(self) -> None:
        self.path, self.metadata, self.files = Path("memory"), {}, ()
        self._specs: dict[str, Spec] = {}
        self._data: dict[str, bytes] = {}
        self.specs = self._specs

    def add(self, values: np.ndarray[Any, Any]) -> Stored:
        """Take an array in."""
        return self.put(Spec(values.shape, _TYPES[values.dtype]), values.tobytes())

    def put(self, spec: Spec, data: bytes) -> Stored:
        """Take bytes in."""
        name = str(len(self._specs))
        self._specs[name], self._data[name] = spec, data
        return Stored(self, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource`."""
        buffer[:] = self._data[name][offset : offset + len(buffer)]

    def position(self, name: str) -> tuple[int, int]:
        """See `TensorSource`."""
        return 0, int(name)


def ref(values: np.ndarray[Any, Any]) -> Stored:
    """Return an array as a tensor that has not been read yet."""
    return Memory().add(np.ascontiguousarray(values))


def array(tensor: Ref | None) -> np.ndarray[Any, Any]:
    """Return a tensor's numbers."""
    assert tensor is not None
    kind = next(kind for kind, dtype in _TYPES.items() if dtype is tensor.spec.dtype)
    return np.ascontiguousarray(bits(tensor)).view(kind)


def scaled(tensor: Ref, factor: float) -> Ref:
    """Return a tensor times a number: what writers are given to fold scales with."""
    values = array(tensor)
    return ref((values.astype(np.float64) * factor).astype(values.dtype))


def equal(one: Record, other: Record) -> bool:
    """Whether two records are of one kind, at one scale, and of the same tensors bit by bit."""
    if type(one) is not type(other) or one.scale != other.scale:
        return False
    first, second = dict(one.refs), dict(other.refs)
    return first.keys() == second.keys() and all(
        first[name].spec == second[name].spec and np.array_equal(bits(first[name]), bits(second[name]))
        for name in first
    )
