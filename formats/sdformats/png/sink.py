"""Writing an embedding into a picture, both as text and in its pixels."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.errors import WriteError
from sdformats.output import PendingFile
from sdformats.place import Place
from sdformats.png.pixels import write_picture
from sdformats.png.source import KEYWORD
from sdformats.png.strips import read_strips, with_strips
from sdformats.png.tensors import MAX_JSON, written
from sdformats.tensor import DType, TensorSink
from sdformats.torch_pickle import flat

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.png.pixels import Pixels
    from sdformats.tensor import Spec
    from sdformats.torch_pickle import Tree

_LONGEST_NUMBER = 24
"""Characters of a number in JSON, with its comma."""


class PngSink(TensorSink):
    """A picture with an embedding in it. Its tensors are kept in memory until `commit`.

    Args:
        path: where the output will be.
        specs: every tensor that will be written; float16, bfloat16 or float32.
        tree: what the embedding's ``.pt`` would hold: plain data with `TensorNamed` where the tensors stand. By default a
            dict of all tensors by name.
        picture: what people see, (height, width, 3).
        overwrite: whether an existing file may be replaced.

    Raises:
        WriteError: a tensor is of another type, or they are too large for a picture.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        tree: Tree = None,
        *,
        picture: Pixels,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        for name, spec in specs.items():
            if spec.dtype not in _NUMBERS:
                raise WriteError(
                    f"is {spec}, and a picture holds numbers that fit float32",
                    path=path,
                    key=name,
                    advice="give --dtype fp32, which rounds, or write another layout",
                )
        if sum(spec.numel for spec in specs.values()) * _LONGEST_NUMBER > MAX_JSON:
            raise WriteError("is too large for a picture", path=path, advice="write another layout")
        self._specs = specs
        self._tree = flat(specs) if tree is None else tree
        self._picture = picture
        self._overwrite = overwrite
        self._data = {name: bytearray(spec.nbytes) for name, spec in specs.items()}

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        self._data[name][offset : offset + len(buffer)] = buffer

    def commit(self) -> None:
        numbers = {name: _floats(self._data[name], spec) for name, spec in self._specs.items()}
        data = written(self._tree, numbers)
        pixels = with_strips(self._picture, data)
        if read_strips(pixels, Place(self.path)) != data:  # noise can look like the black columns beside the picture
            raise WriteError("cannot be drawn beside so low a picture", path=self.path, advice="use a higher one")
        file = write_picture(pixels, {KEYWORD: base64.b64encode(data)})
        pending = PendingFile(self.path, len(file), overwrite=self._overwrite)
        try:
            pending.write(0, memoryview(file))
        except BaseException:
            pending.abort()
            raise
        pending.commit()

    def abort(self) -> None:
        """See `TensorSink.abort`. Nothing has been created yet."""


def _floats(data: bytearray, spec: Spec) -> np.ndarray[Any, Any]:
    return np.asarray(_NUMBERS[spec.dtype](data)).reshape(spec.shape)


_NUMBERS: dict[DType, Any] = {
    DType.F16: lambda data: np.frombuffer(data, "<f2"),
    DType.BF16: lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),
    DType.F32: lambda data: np.frombuffer(data, "<f4"),
}
