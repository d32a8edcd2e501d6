"""The contract between files and everything else: a tensor is a name, a `Spec` and bytes at an offset.

Bytes are always little-endian, contiguous (C order) and without padding, whatever the container does inside.
A container is one `TensorSource` to read it and, where we write it, one `TensorSink`.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from sdformats.positional import InputFile


class DType(enum.Enum):
    """Element types, under the names that safetensors gives them. The value is the width in bits."""

    BOOL = ("BOOL", 8)
    F4 = ("F4", 4)
    F6_E2M3 = ("F6_E2M3", 6)
    F6_E3M2 = ("F6_E3M2", 6)
    U8 = ("U8", 8)
    I8 = ("I8", 8)
    F8_E5M2 = ("F8_E5M2", 8)
    F8_E4M3 = ("F8_E4M3", 8)
    F8_E8M0 = ("F8_E8M0", 8)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8)
    I16 = ("I16", 16)
    U16 = ("U16", 16)
    F16 = ("F16", 16)
    BF16 = ("BF16", 16)
    I32 = ("I32", 32)
    U32 = ("U32", 32)
    F32 = ("F32", 32)
    C64 = ("C64", 64)
    F64 = ("F64", 64)
    I64 = ("I64", 64)
    U64 = ("U64", 64)

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        return self.value[1]

    @property
    def itemsize(self) -> int:
        """Width of one element in bytes (0 for the types narrower than a byte)."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether the type holds real floating-point numbers that can be merged."""
        return self.name.startswith(("F", "BF"))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and type of a tensor. Rank 0 and zero sizes are legal."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes; elements narrower than a byte are packed."""
        return self.numel * self.dtype.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


class TensorSource(ABC):
    """A readable set of named tensors.

    Structure is validated completely before the constructor returns; no tensor is read before it is asked for.
    All methods may be called from several threads at once.
    """

    path: Path
    """Where it came from: a file or a folder."""
    container: str
    """How it is stored: ``safetensors``, ``torch-zip``, ``torch-legacy``, ``pickle``, ``folder``, ``sharded``."""
    specs: Mapping[str, Spec]
    """Every tensor by name, in the order of its bytes in the file."""
    metadata: Mapping[str, str]
    """Texts that the file carries beside its tensors."""
    notes: tuple[str, ...] = ()
    """What a user should know about how the file was read (content that is no tensor, and the like)."""
    files: tuple[InputFile, ...]
    """The open files that the bytes come from."""

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable bytes) with the tensor's bytes from byte `offset` on.

        Raises:
            ChangedFile: the file became shorter than it was when it was opened.
            CorruptFile: the bytes cannot be decoded.
        """

    @abstractmethod
    def position(self, name: str) -> tuple[int, int]:
        """Where the tensor's bytes lie, as (index of file, offset), for reading in order."""

    def extent(self, name: str) -> tuple[int, int] | None:
        """Return (file descriptor, offset) where the tensor's bytes can be read as they are, in one piece.

        None where only `read_into` gives them, or checks them.
        """
        return None

    def read(self, name: str) -> bytearray:
        """Return all bytes of one tensor."""
        data = bytearray(self.specs[name].nbytes)
        self.read_into(name, 0, memoryview(data))
        return data

    def verify(self) -> None:
        """Check what can only be checked after reading: checksums of what was read, and that no file changed.

        Raises:
            CorruptFile: a checksum is wrong.
            ChangedFile: a file's size, time or identity is not what it was.
        """
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files. A closed source still knows its specs and metadata."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorSink(ABC):
    """A set of named tensors being written. Nothing is visible at `path` before `commit`.

    As a context manager it commits when the block ends well and aborts when it does not.
    """

    path: Path
    """Where the output will be."""

    @abstractmethod
    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        """Put bytes at byte `offset` of the tensor. May be called from several threads at once."""

    @abstractmethod
    def commit(self) -> None:
        """Make the output durable and visible, in one step."""

    @abstractmethod
    def abort(self) -> None:
        """Leave no trace. Does nothing after `commit`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()
