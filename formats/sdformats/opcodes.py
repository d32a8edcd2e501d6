"""The pickle machine, without the part that runs anything.

A pickle is a program for a stack machine. This one knows the opcodes of protocols 2 to 5 and builds plain Python data:
None, numbers, text, bytes, lists, tuples and dicts. Whatever would import or call something is handed to a `World`, which
looks the name up in a table and returns inert data; there is no path from a file to an import, an attribute or a call.

Opcodes of protocols 0 and 1 that no torch or Python 3 pickle holds are refused, and so are the extension registry and
buffers outside the stream.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sdformats.pickle_names import Global

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdformats.errors import CorruptFile, FormatError
    from sdformats.pickle_stream import Budget, Stream
    from sdformats.place import Place

MAX_LONG = 255
"""Longest whole number in bytes."""
_MISSING: Any = object()


class World(Protocol):
    """What a pickle's names mean."""

    place: Place

    def find(self, module: str, name: str) -> Global:
        """Return the name, or raise if it is not in the table."""

    def call(self, function: object, arguments: object) -> object:
        """Return what stands for the result of a call (REDUCE)."""

    def create(self, kind: object, arguments: object) -> object:
        """Return what stands for a new object (NEWOBJ)."""

    def build(self, thing: object, state: object) -> None:
        """Give an object its state (BUILD)."""

    def refer(self, identity: object) -> object:
        """Return what a persistent id stands for (BINPERSID)."""

    def extend(self, thing: object, items: list[Any]) -> bool:
        """Give items to an object that is no plain list or dict; say whether it takes any."""


@dataclass(slots=True, repr=False)  # what is on the stack can take for ever to print
class Machine:
    """One run over one pickle.

    Every step raises `CorruptFile` where the pickle does not hold what its opcode needs.
    """

    stream: Stream
    world: World
    budget: Budget
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """Take opcodes until STOP; return what the pickle says.

        Raises:
            CorruptFile: the stream is malformed.
            UnsafeFile: it names what is not in the table, or costs too much.
            UnsupportedFile: it holds something that is not read.
        """
        self._begin()
        stream, budget = self.stream, self.budget
        while (code := stream.take(1)[0]) != _STOP:
            step = _STEPS.get(code)
            if step is None:
                raise self._unknown(code)
            budget.steps -= 1
            if budget.steps < 0:
                budget.spend_steps(0, self.world.place)
            step(self)
        if len(self.stack) != 1 or self.marks:
            raise self.corrupt("stops with more or less than one object")
        return self.stack[0]

    def corrupt(self, problem: str, expected: str | None = None) -> CorruptFile:
        """Return an error that tells where in the pickle it is."""
        return self.world.place.corrupt(f"has a pickle that {problem} (byte {self.stream.at:,})", expected)

    def _begin(self) -> None:
        if self.stream.take(1)[0] != _PROTO:
            raise self.world.place.unsupported("has a pickle of protocol 0 or 1", "protocol 2 to 5")
        protocol = self.stream.take(1)[0]
        if not 2 <= protocol <= 5:
            raise self.world.place.unsupported(f"has a pickle of protocol {protocol}", "protocol 2 to 5")

    def _unknown(self, code: int) -> FormatError:
        if code in _REFUSED:
            return self.world.place.unsupported(
                f"has a pickle that uses {_REFUSED[code]}", advice="save it again with torch"
            )
        return self.corrupt(f"holds the byte {code:#04x} in place of an opcode")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the topmost value."""
        if not self.stack:
            raise self.corrupt("takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        """Look at the topmost value."""
        if not self.stack:
            raise self.corrupt("looks at an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        if not self.marks:
            raise self.corrupt("lacks a mark")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        """Take the topmost `count` values, in the order in which they were put."""
        if len(self.stack) < count:
            raise self.corrupt("takes from an empty stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def remember(self, key: int) -> None:
        """Put the topmost value into the memo."""
        self.memo[key] = self.top()

    def recall(self, key: int) -> None:
        """Push what the memo holds."""
        value = self.memo.get(key, _MISSING)
        if value is _MISSING:
            raise self.corrupt(f"recalls {key}, which was never remembered")
        self.stack.append(value)

    def text(self, count: int) -> None:
        """Push text of `count` bytes of UTF-8. Python writes half surrogate pairs as they are."""
        try:
            self.stack.append(self.stream.take(count).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise self.corrupt("holds text that is not UTF-8") from None

    def python2_text(self, count: int) -> None:
        """Push a Python 2 string: text where it is UTF-8, else bytes."""
        if count < 0:
            raise self.corrupt("holds a string of negative length")
        data = self.stream.take(count)
        try:
            self.stack.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            self.stack.append(data)

    def long(self, count: int) -> None:
        """Push a whole number of `count` bytes, little-endian, two's complement."""
        if not 0 <= count <= MAX_LONG:
            raise self.corrupt(f"holds a number of {count:,} bytes", f"at most {MAX_LONG}")
        self.stack.append(int.from_bytes(self.stream.take(count), "little", signed=True))

    def decimal(self) -> None:
        """Push a whole number written out (Python 2 does so past 32 bits)."""
        line = self.stream.line(24)
        if line in (b"00", b"01"):
            self.stack.append(line == b"01")
            return
        try:
            self.stack.append(int(line))
        except ValueError:
            raise self.corrupt("holds a malformed number") from None

    def find_line(self) -> None:
        """GLOBAL: module and name, each on a line of its own."""
        try:
            module, name = self.stream.line().decode("utf-8"), self.stream.line().decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt("holds a name that is not UTF-8") from None
        self.stack.append(self.world.find(module, name))

    def find_stack(self) -> None:
        """STACK_GLOBAL: module and name from the stack."""
        module, name = self.pop_tuple(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.corrupt("names something by what is no text")
        self.stack.append(self.world.find(module, name))

    def reduce(self) -> None:
        """REDUCE: a call, which the world answers."""
        function, arguments = self.pop_tuple(2)
        self.stack.append(self.world.call(function, arguments))

    def create(self) -> None:
        """NEWOBJ: a new object, which the world answers."""
        kind, arguments = self.pop_tuple(2)
        self.stack.append(self.world.create(kind, arguments))

    def create_named(self) -> None:
        """NEWOBJ_EX: a new object with keyword arguments."""
        kind, arguments, named = self.pop_tuple(3)
        self.stack.append(self.world.create(kind, (arguments, named)))

    def build(self) -> None:
        """BUILD: state for the object below."""
        state = self.pop()
        self.world.build(self.top(), state)

    def refer(self) -> None:
        """BINPERSID: a tensor's storage."""
        self.stack.append(self.world.refer(self.pop()))

    def append(self, items: list[Any]) -> None:
        """Give items to the list below."""
        below = self.top()
        if type(below) is list:
            below.extend(items)
        elif not self.world.extend(below, items):
            raise self.corrupt("appends to what is no list")

    def set_items(self, items: list[Any]) -> None:
        """Give keys and values to the dict below."""
        below = self.top()
        if len(items) % 2:
            raise self.corrupt("has a key without a value")
        if type(below) is dict:
            put_items(below, items, self.budget, self.world.place)
        elif not self.world.extend(below, items):
            raise self.corrupt("sets items of what is no dict")


def put_items(target: dict[Any, Any], items: list[Any], budget: Budget, place: Place) -> None:
    """Put alternating keys and values into a plain dict. Only keys that are cheap to compare are taken.

    Raises:
        UnsafeFile: a key is something else than text, a whole number, bytes or the name of a class.
        CorruptFile: a key is there already.
    """
    for key, value in zip(items[::2], items[1::2], strict=True):
        kind = type(key)
        if kind is int:
            if not -(1 << 31) <= key < 1 << 31:
                budget.spend_wide_key(place)
        elif kind not in (str, bytes, Global):
            raise place.unsafe(f"has a dict key that is a {kind.__name__}", "text, a whole number or bytes")
        if key in target:
            raise place.corrupt(f"has the dict key {str(key)[:80]!r} twice")
        target[key] = value


_STOP, _PROTO = ord("."), 0x80


def _number(layout: str, use: Callable[[Machine, Any], object]) -> Callable[[Machine], object]:
    """Make a step that reads one number and uses it."""
    form = struct.Struct("<" + layout)
    size, unpack = form.size, form.unpack

    def step(machine: Machine) -> None:
        use(machine, unpack(machine.stream.take(size))[0])

    return step


def _protocol_again(machine: Machine) -> None:
    raise machine.corrupt("begins a second time")


def _frame(machine: Machine, length: int) -> None:
    if length > machine.stream.left:
        raise machine.corrupt(f"has a frame of {length:,} bytes", f"at most {machine.stream.left:,}")


def _mark(machine: Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop_any(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _push_bytes(machine: Machine, count: int) -> None:
    machine.push(machine.stream.take_large(count))


def _dict(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.push({})
    machine.set_items(items)


_STEPS: dict[int, Callable[[Machine], object]] = {
    _PROTO: _protocol_again,
    0x95: _number("Q", _frame),
    ord("("): _mark,
    ord("0"): _pop_any,
    ord("1"): Machine.pop_mark,
    ord("2"): lambda m: m.push(m.top()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): Machine.decimal,
    ord("J"): _number("i", Machine.push),
    ord("K"): _number("B", Machine.push),
    ord("M"): _number("H", Machine.push),
    0x8A: _number("B", Machine.long),
    0x8B: _number("i", Machine.long),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.stream.take(8))[0]),
    ord("X"): _number("I", Machine.text),
    0x8C: _number("B", Machine.text),
    0x8D: _number("Q", Machine.text),
    ord("T"): _number("i", Machine.python2_text),
    ord("U"): _number("B", Machine.python2_text),
    ord("B"): _number("I", _push_bytes),
    ord("C"): _number("B", _push_bytes),
    0x8E: _number("Q", _push_bytes),
    0x96: _number("Q", _push_bytes),
    0x98: lambda m: m.top(),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push(m.pop_tuple(1)),
    0x86: lambda m: m.push(m.pop_tuple(2)),
    0x87: lambda m: m.push(m.pop_tuple(3)),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict,
    ord("s"): lambda m: m.set_items(list(m.pop_tuple(2))),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push([]),
    0x90: lambda m: m.append(m.pop_mark()),
    0x91: lambda m: m.push(m.pop_mark()),
    ord("q"): _number("B", Machine.remember),
    ord("r"): _number("I", Machine.remember),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): _number("B", Machine.recall),
    ord("j"): _number("I", Machine.recall),
    ord("c"): Machine.find_line,
    0x93: Machine.find_stack,
    ord("R"): Machine.reduce,
    0x81: Machine.create,
    0x92: Machine.create_named,
    ord("b"): Machine.build,
    ord("Q"): Machine.refer,
}
"""What each opcode does. Sets become lists: nothing here needs to hash what is in them."""

_REFUSED = {
    **{ord(code): "text opcodes of protocol 0" for code in "SVLFgpP"},
    **{ord(code): "class instances of protocol 0 or 1" for code in "io"},
    **dict.fromkeys((0x82, 0x83, 0x84), "Python's extension registry"),
    0x97: "buffers outside the stream",
}
