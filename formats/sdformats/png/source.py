"""Reading the embedding in a PNG picture as named tensors, exactly as its ``.pt`` would be read."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.contents import sort_out
from sdformats.place import Place
from sdformats.png.chunks import SIGNATURE, Chunks
from sdformats.png.pixels import read_pixels
from sdformats.png.strips import read_strips
from sdformats.png.tensors import parsed
from sdformats.positional import InputFile
from sdformats.tensor import TensorSource

if TYPE_CHECKING:
    from sdformats.png.chunks import Chunk

KEYWORD = b"sd-ti-embedding"


class PngSource(TensorSource):
    """The embedding in a picture. See `contents` for how tensors are named, and what becomes metadata.

    Args:
        file: the picture, or its path. The source owns it from here on and closes it.

    Raises:
        UnsupportedFile: it is a picture without an embedding.
        CorruptFile, UnsafeFile: it is broken or hostile.
    """

    def __init__(self, file: InputFile | Path | str) -> None:
        opened = file if isinstance(file, InputFile) else InputFile(Path(file))
        self.path = opened.path
        self.files = (opened,)
        place = Place(opened.path)
        try:
            chunks = Chunks(opened, place)
            self.container, data, first = _find(chunks, place)
            content = sort_out(parsed(data, place, first.start), place)
            if not content.tensors:
                raise place.corrupt("holds an embedding without tensors")
        except BaseException:
            opened.close()
            raise
        self._tensors = content.tensors
        self.specs = {name: ref.spec for name, ref in content.tensors.items()}
        self.metadata = content.metadata
        self.notes = tuple(content.notes)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`. The tensors are in memory."""
        self._tensors[name].span.record.read_into(offset, buffer)

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._tensors[name].span.position


def _find(chunks: Chunks, place: Place) -> tuple[str, bytes, Chunk]:
    """Return which way the embedding is stored, its JSON, and a chunk where it is."""
    text = chunks.text(KEYWORD)
    if text is not None:
        try:
            return "png-text", base64.b64decode(text, validate=True), chunks.all[0]
        except binascii.Error as error:
            raise place.corrupt("has an embedding that is no base64") from error
    strips = read_strips(read_pixels(chunks, place), place)
    if strips is None:
        raise place.unsupported(
            "is a PNG picture without an embedding in it",
            advice="a picture that a site or chat has repacked may have lost it: get the original file",
        )
    return "png-pixels", strips, next(chunk for chunk in chunks.all if chunk.kind == b"IDAT")


__all__ = ["SIGNATURE", "PngSource"]
