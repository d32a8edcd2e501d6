"""A tree of plain data and tensors as JSON: a tensor is ``{"TORCHTENSOR": [[…]]}``.

Numbers come back as float32, which is what the programs that read these pictures use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.records import MemoryRecord, Span
from sdformats.strided import contiguous_strides, view
from sdformats.tensor import DType
from sdformats.torch_pickle import TensorNamed

if TYPE_CHECKING:
    from sdformats.place import Place
    from sdformats.strided import TensorRef
    from sdformats.torch_pickle import Tree

MAX_JSON = 16 << 20
"""Longest JSON in bytes."""
_MAX_BRACKETS = 1 << 16
_MAX_DEPTH = 32
_MARK = "TORCHTENSOR"


def parsed(data: bytes, place: Place, position: int) -> dict[str, Any]:
    """Return the tree that some JSON is, with `TensorRef` where there are tensors.

    Args:
        data: the JSON.
        place: for errors.
        position: where it lies in the file.

    Raises:
        CorruptFile: it is no JSON object, or a tensor in it is none.
        UnsafeFile: it is too long, too deep, or holds too many lists.
    """
    if len(data) > MAX_JSON:
        raise place.unsafe(f"holds JSON of {len(data):,} bytes", f"at most {MAX_JSON:,}")
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > _MAX_BRACKETS:
        raise place.unsafe(f"holds JSON with {brackets:,} lists and objects", f"at most {_MAX_BRACKETS:,}")
    try:
        tree = json.loads(data)
    except RecursionError:
        raise place.unsafe("holds JSON that is nested too deeply", f"at most {_MAX_DEPTH} levels") from None
    except ValueError as error:
        raise place.corrupt(f"holds what is no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise place.corrupt("holds JSON without names", "an object")
    return {key: _with_tensors(value, place, position, 1) for key, value in tree.items()}


def _with_tensors(value: Any, place: Place, position: int, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise place.unsafe("holds JSON that is nested too deeply", f"at most {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        if _MARK in value:
            return _tensor(value[_MARK], place, position)
        return {key: _with_tensors(item, place, position, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, place, position, depth + 1) for item in value]
    return value


def _tensor(value: Any, place: Place, position: int) -> TensorRef:
    """Return what a number, a list of numbers or a list of such lists is as a tensor of float32."""
    rows = value if isinstance(value, list) and any(isinstance(row, list) for row in value) else [value]
    lists = [row if isinstance(row, list) else [row] for row in rows]
    if rows is value and not all(isinstance(row, list) for row in value):
        raise place.corrupt("holds a tensor of numbers and lists side by side", "equal lists of numbers")
    if any(isinstance(item, list) for row in lists for item in row):
        raise place.corrupt("holds a tensor that is nested too deeply", "a list of lists of numbers")
    if any(set(map(type, row)) - {int, float} for row in lists):
        raise place.corrupt("holds a tensor with something that is no number", "numbers alone")
    if len({len(row) for row in lists}) > 1:
        raise place.corrupt("holds a tensor with rows of different lengths", "equal lists of numbers")
    try:
        wide = np.array(lists, np.float64)
    except OverflowError as error:
        raise place.corrupt("holds a tensor with a number beyond all floats") from error
    with np.errstate(over="ignore"):
        numbers = wide.astype("<f4")
    if not np.array_equal(np.isinf(numbers), np.isinf(wide)):
        raise place.corrupt("holds a tensor with a number too large for float32")
    if rows is not value:
        numbers = numbers[0] if isinstance(value, list) else numbers[0, 0]
    data = numbers.tobytes()
    shape = numbers.shape
    return view(Span(MemoryRecord(data, position), 0, len(data)), DType.F32, 0, shape, contiguous_strides(shape), place)


def written(tree: Tree, tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Return the JSON of a tree.

    Args:
        tree: plain data, with `TensorNamed` where tensors stand.
        tensors: their numbers, as floats.
    """

    def plain(value: Tree) -> Any:
        if isinstance(value, TensorNamed):
            return {_MARK: tensors[value.name].astype(np.float64).tolist()}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return json.dumps(plain(tree)).encode("ascii")
