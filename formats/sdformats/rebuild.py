"""What the names in a pickle stand for: tensors as a place in a record, everything else as plain or inert data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.arrays import Array, ArrayType, from_buffer, narrowed, scalar, span_of
from sdformats.opcodes import put_items
from sdformats.pickle_names import (
    ARRAYS,
    OPAQUE,
    PARAMETER_LISTS,
    PLAIN,
    REBUILD,
    STORAGES,
    TORCH_TYPES,
    UNSUPPORTED,
    UNTYPED,
    Global,
    is_known,
    normal_name,
)
from sdformats.place import Mismatch, Place
from sdformats.strided import TensorRef, view, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdformats.pickle_stream import Budget
    from sdformats.records import Span
    from sdformats.tensor import DType

_LONGEST_KEY = 200
_OLD_NEW = Global("copyreg", "_reconstructor")
_TENSOR_ARGUMENTS = {"_rebuild_tensor": (4, 4), "_rebuild_tensor_v2": (6, 7), "_rebuild_tensor_v3": (7, 8)}
_LATIN1 = ("latin1", "latin-1", "iso-8859-1")
_CODE_ROOTS = ("torch.nn.", "diffusers.", "transformers.", "ldm.")


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """An object of a known class, without behaviour: what it was made from, and the state it was given."""

    kind: Global
    arguments: object = ()
    state: object = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory that tensors are views of. `dtype` is None where the storage itself has no element type."""

    span: Span
    dtype: DType | None
    big_endian: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class StorageId:
    """What a pickle says about a storage that lies outside it."""

    key: str
    dtype: DType | None
    count: int
    view: object = None

    @property
    def itemsize(self) -> int:
        """Bytes in one of the `count` elements; those without a type count bytes."""
        return 1 if self.dtype is None else self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the storage."""
        return self.count * self.itemsize


class Rebuild:
    """The world of one pickle.

    Args:
        place: for errors.
        budget: shared by all pickles of the file.
        storage: finds the storage that a persistent id means; None where a pickle has no storages beside it.
        load: reads torch's old format from a byte string inside the pickle; None where that is not allowed.
        position: where the pickle lies in the file.
    """

    def __init__(
        self,
        place: Place,
        budget: Budget,
        storage: Callable[[StorageId], Storage] | None = None,
        load: Callable[[Span], object] | None = None,
        position: int = 0,
    ) -> None:
        self.place = place
        self.budget = budget
        self.dropped: set[str] = set()
        """Attributes of dicts and tensors, which have no place in plain data."""
        self._storage = storage
        self._load = load
        self._position = position

    def find(self, module: str, name: str) -> Global:
        found = normal_name(module, name)
        if found in UNSUPPORTED:
            raise self.place.unsupported(f"holds {UNSUPPORTED[found]}", "dense tensors of plain types")
        if not is_known(found):
            shown = ascii(str(found)[:200])[1:-1]
            if module.startswith(_CODE_ROOTS):
                raise self.place.unsafe(
                    f"holds a whole object ({shown}), code and all", advice="save its state_dict() instead"
                )
            raise self.place.unsafe(
                f"names {shown}, which other programs would import and may run",
                advice="get the same weights as .safetensors, or leave this file alone",
            )
        return found

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self.place.corrupt("has a pickle that calls what is no function")
        try:
            if function in PLAIN:
                return self._plain(function.name, arguments)
            if function in REBUILD:
                return self._rebuild(function.name, arguments)
            if function in ARRAYS:
                return self._array(function.name, arguments)
        except Mismatch:
            raise self.place.corrupt(f"has a pickle with malformed arguments for {function}") from None
        return self.create(function, arguments)

    def create(self, kind: object, arguments: object) -> object:
        if kind == _OLD_NEW and isinstance(arguments, tuple) and arguments:
            kind, arguments = arguments[0], arguments[1:]
        if not isinstance(kind, Global):
            raise self.place.corrupt("has a pickle that makes an object of what is no class")
        if kind in PLAIN and isinstance(arguments, tuple):
            return self.call(kind, arguments)
        if kind in OPAQUE or kind in PARAMETER_LISTS or kind.module == "numpy.dtypes":
            return Node(kind, arguments)
        raise self.place.corrupt(f"has a pickle that makes an object of {kind}")

    def build(self, thing: object, state: object) -> None:
        try:
            if isinstance(thing, Node):
                thing.state = state
            elif isinstance(thing, Array):
                thing.build(state, self.place, self._position)
            elif isinstance(thing, ArrayType):
                thing.build(state)
            elif isinstance(thing, dict | TensorRef):
                self._drop(state)
            else:
                raise Mismatch
        except Mismatch:
            raise self.place.corrupt(f"has a pickle with a malformed state for a {type(thing).__name__}") from None

    def refer(self, identity: object) -> object:
        if self._storage is None:
            raise self.place.corrupt("has a pickle that refers to storages, and no storages")
        match identity:
            case ("module", *_):
                raise self.place.unsafe("holds a whole module, code and all", advice="save its state_dict() instead")
            case ("storage", Global() as kind, str(key), _, int(count)):
                seen: object = None
            case ("storage", Global() as kind, str(key), _, int(count), seen):
                pass
            case _:
                key = ""
        if not 0 < len(key) <= _LONGEST_KEY:
            raise self.place.corrupt("has a pickle with a malformed reference to a storage")
        if kind not in UNTYPED and (kind.module != "torch" or kind.name not in STORAGES):
            raise self.place.corrupt(f"has a pickle that takes {kind} for a storage")
        try:
            return self._storage(StorageId(key, STORAGES.get(kind.name), whole(count), seen))
        except Mismatch:
            raise self.place.corrupt(f"has a pickle with a malformed reference to the storage {key!r}") from None

    def extend(self, thing: object, items: list[Any]) -> bool:
        if not isinstance(thing, Node):
            return False
        thing.items.extend(items)
        return True

    def _drop(self, state: object) -> None:
        if isinstance(state, dict):
            # torch keeps the versions of modules under _metadata; nothing that reads weights needs them.
            names = [str(name)[:80] for name in state if name != "_metadata"]
            self.dropped.update(names[: max(0, 8 - len(self.dropped))])
        elif state is not None:
            self.dropped.add(type(state).__name__)

    def _plain(self, name: str, arguments: tuple[Any, ...]) -> object:
        match name:
            case "OrderedDict" | "Counter":
                return self._dict(arguments)
            case "defaultdict":
                return self._dict(arguments[1:])
            case "set" | "frozenset":
                return list(self._sequence(arguments))
            case "Size":
                return tuple(self._sequence(arguments))
        return self._bytes(arguments, "")

    def _dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        if not arguments:
            return result
        pairs = arguments[0]
        if len(arguments) > 1 or not isinstance(pairs, dict | list | tuple):
            raise Mismatch
        self.budget.spend_steps(len(pairs), self.place)
        if isinstance(pairs, dict):
            return dict(pairs)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise Mismatch
        put_items(result, [item for pair in pairs for item in pair], self.budget, self.place)
        return result

    def _sequence(self, arguments: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        if not arguments:
            return ()
        if len(arguments) > 1 or not isinstance(arguments[0], list | tuple):
            raise Mismatch
        self.budget.spend_steps(len(arguments[0]), self.place)
        return arguments[0]

    def _bytes(self, arguments: tuple[Any, ...], default: str) -> object:
        match arguments or (default, "latin1"):
            case (str(text), str(encoding)) if encoding in _LATIN1:
                self.budget.spend_bytes(len(text), self.place)
                try:
                    return text.encode("latin1")
                except UnicodeEncodeError:
                    raise Mismatch from None
            case (bytes(data),):
                return data
            case (str(text), str(encoding)):
                raise self.place.unsafe(f"encodes text as {encoding[:40]!r}", "latin1, as Python writes bytes")
        raise Mismatch

    def _rebuild(self, name: str, arguments: tuple[Any, ...]) -> object:
        if name in _TENSOR_ARGUMENTS:
            return self._tensor(name, arguments)
        match name, arguments:
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (TensorRef() | Array() as data, _, _, *states):
                for state in states:
                    self._drop(state)
                return data
            case "_rebuild_device_tensor_from_numpy", (Array(TensorRef() as data), Global() as kind, *_):
                return narrowed(data, self._type(kind), self.place)
            case "_rebuild_device_tensor_from_cpu_tensor", (TensorRef() as data, Global() as kind, *_):
                if data.spec.dtype is self._type(kind):
                    return data
            case "_rebuild_from_type_v2", (
                Global() as function,
                Global(name="Tensor" | "Parameter"),
                tuple(rest),
                state,
            ):
                self._drop(state)
                if function in REBUILD and function.name != name:
                    return self._rebuild(function.name, rest)
            case "_load_from_bytes", (data,) if self._load is not None:
                return self._load(span_of(data, self._position))
        raise Mismatch

    def _type(self, kind: object) -> DType:
        if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in TORCH_TYPES:
            raise Mismatch
        return TORCH_TYPES[kind.name]

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> TensorRef:
        """Storage, offset, shape, strides; then perhaps two that only matter in training, a type, and signs."""
        least, most = _TENSOR_ARGUMENTS[name]
        if not least <= len(arguments) <= most or not isinstance(arguments[0], Storage):
            raise Mismatch
        storage, offset, shape, strides, *rest = arguments
        kind = self._type(rest[2]) if name == "_rebuild_tensor_v3" else storage.dtype
        signs = rest[-1] if len(arguments) > least else None
        flags: dict[Any, Any] = signs if isinstance(signs, dict) else {}
        if kind is None or not isinstance(signs, dict | None) or not flags.keys() <= {"conj", "neg"}:
            raise Mismatch
        if not all(type(flag) is bool for flag in flags.values()):
            raise Mismatch
        return view(
            storage.span,
            kind,
            offset,
            shape,
            strides,
            self.place,
            big_endian=storage.big_endian,
            conjugate=flags.get("conj", False),
            negate=flags.get("neg", False),
        )

    def _array(self, name: str, arguments: tuple[Any, ...]) -> object:
        match name:
            case "dtype":
                return ArrayType.of(arguments)
            case "_reconstruct":
                return Array()
            case "_frombuffer":
                return from_buffer(arguments, self.place, self._position)
            case "scalar":
                value = scalar(arguments)
                return Node(Global("numpy.core.multiarray", "scalar"), arguments) if value is None else value
        raise Mismatch
