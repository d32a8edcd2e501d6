"""The pickle inside a file that ``torch.save`` would write, put together opcode by opcode.

A tree of plain data is written in protocol 2, as torch does. A `TensorNamed` in it becomes a call of torch's own rebuilding
function, which refers to the storage beside the pickle by a key. Nothing else is ever called, so that
``torch.load(weights_only=True)`` takes it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sdformats.errors import WriteError
from sdformats.pickle_names import STORAGES, TORCH_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.tensor import DType, Spec

MAX_DEPTH = 64
"""Levels in a tree, as many as the reader takes."""


@dataclass(frozen=True, slots=True)
class TensorNamed:
    """The place of a tensor in a tree."""

    name: str


Tree: TypeAlias = "TensorNamed | str | int | float | Sequence[Tree] | Mapping[Any, Tree] | None"
"""Plain data. The keys of dicts are text or whole numbers."""

_TYPED = {kind: f"torch\n{name}" for name, kind in STORAGES.items()}
_NAMES: dict[DType, str] = {kind: name for name, kind in TORCH_TYPES.items()}
_UNTYPED = "torch.storage\nUntypedStorage"


def flat(specs: Mapping[str, Spec]) -> Tree:
    """Return the tree that most files are: every tensor under its name; a lone one without a name stands alone."""
    if list(specs) == [""]:
        return TensorNamed("")
    return {name: TensorNamed(name) for name in specs}


def write_pickle(tree: Tree, specs: Mapping[str, Spec], path: Path) -> tuple[bytes, dict[str, str]]:
    """Return the pickle of a tree, and each tensor's storage key: 0, 1, … in the order of the tree.

    Args:
        tree: plain data; each tensor of `specs` stands in it once.
        specs: shapes and types.
        path: the output, for errors.

    Raises:
        WriteError: the tree holds what is no plain data, misses a tensor, or torch has no such type.
    """
    writer = _Writer(specs, path)
    writer.put(tree)
    missing = [name for name in specs if name not in writer.keys]
    if missing:
        raise WriteError("has no place in the tree", path=path, key=missing[0])
    return b"\x80\x02" + bytes(writer.out) + b".", writer.keys


class _Writer:
    def __init__(self, specs: Mapping[str, Spec], path: Path) -> None:
        self.out = bytearray()
        self.keys: dict[str, str] = {}
        self._specs = specs
        self._path = path
        self._memo: dict[str, int] = {}

    def put(self, value: Any, depth: int = 0) -> None:
        """Append any value of a tree."""
        if depth > MAX_DEPTH:
            raise WriteError("has values nested too deeply", path=self._path, expected=f"at most {MAX_DEPTH} levels")
        if isinstance(value, TensorNamed):
            self._tensor(value.name)
        elif isinstance(value, Mapping):
            self.out += b"}("
            for key, item in value.items():
                if type(key) not in (str, int):
                    raise self._unknown(key)
                self.put(key)
                self.put(item, depth + 1)
            self.out += b"u"
        elif isinstance(value, list):
            self.out += b"]("
            for item in value:
                self.put(item, depth + 1)
            self.out += b"e"
        elif isinstance(value, tuple):
            self.out += b"("
            for item in value:
                self.put(item, depth + 1)
            self.out += b"t"
        else:
            self._plain(value)

    def _plain(self, value: Any) -> None:
        if value is None:
            self.out += b"N"
        elif type(value) is bool:
            self.out += b"\x88" if value else b"\x89"
        elif type(value) is int:
            self._integer(value)
        elif type(value) is float:
            self.out += b"G" + struct.pack(">d", value)
        elif type(value) is str:
            self._text(value)
        else:
            raise self._unknown(value)

    def _unknown(self, value: Any) -> WriteError:
        expected = "dicts with keys of text or whole numbers, lists, tuples, text, numbers, true, false, none"
        return WriteError(f"cannot hold a value of type {type(value).__name__}", path=self._path, expected=expected)

    def _integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + struct.pack("<B", value)
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 255:
                raise WriteError("cannot hold a whole number of over 255 bytes", path=self._path)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _text(self, value: str) -> None:
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise WriteError("cannot hold half a surrogate pair", path=self._path, key=ascii(value)[1:-1]) from error
        self.out += b"X" + struct.pack("<I", len(data)) + data

    def _shared(self, mark: str, code: bytes) -> None:
        """Append what stands in a pickle again and again: in full once, by its number from then on."""
        at = self._memo.get(mark)
        if at is None:
            self._memo[mark] = len(self._memo)
            self.out += code + b"q" + bytes([self._memo[mark]])
        else:
            self.out += b"h" + bytes([at])

    def _global(self, name: str) -> None:
        self._shared(name, b"c" + name.encode() + b"\n")

    def _word(self, word: str) -> None:
        self._shared(word, b"X" + struct.pack("<I", len(word)) + word.encode())

    def _tensor(self, name: str) -> None:
        """Append a call of ``_rebuild_tensor_v2`` or, for types that have no storage of their own, ``_v3``."""
        spec = self._specs[name]
        if name in self.keys:
            raise WriteError("stands in the tree twice", path=self._path, key=name)
        if spec.dtype not in _NAMES:
            raise WriteError(f"is of type {spec.dtype}, which torch has not", path=self._path, key=name,
                             advice="write safetensors, or give another --dtype")  # fmt: skip
        key = self.keys[name] = str(len(self.keys))
        typed = spec.dtype in _TYPED
        self._global(f"torch._utils\n_rebuild_tensor_v{2 if typed else 3}")
        self.out += b"(("
        self._word("storage")
        self._global(_TYPED.get(spec.dtype, _UNTYPED))
        self._text(key)
        self._word("cpu")
        self._integer(spec.numel if typed else spec.nbytes)
        self.out += b"tQK\0"
        self.put(spec.shape)
        self.put(_strides(spec.shape))
        self.out += b"\x89"
        self._global("collections\nOrderedDict")
        self.out += b")R"
        if not typed:
            self._global(f"torch\n{_NAMES[spec.dtype]}")
        self.out += b"tR"


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the steps of a contiguous tensor, in elements, as torch counts them."""
    steps: list[int] = []
    step = 1
    for length in reversed(shape):
        steps.append(step)
        step *= max(length, 1)
    return tuple(reversed(steps))
