"""Which of the things in a pickle are the model's tensors, what they are called, and what becomes of the rest.

1. A dict with a dict under ``state_dict`` is a training checkpoint: the tensors under it are the model, under their own
   names; whatever stands beside it (optimizer, callbacks, …) is left out.
2. A dict in which nothing but one wrapper (``model``, ``module``, ``params``, …) holds tensors is unwrapped.
3. Else every tensor counts. Its name is the path to it, joined by dots; the items of lists go by their index.

Plain values at the top become texts (see `Content.metadata`). What is left out is counted and told in notes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.arrays import Array
from sdformats.pickle_names import PARAMETER_LISTS, Global
from sdformats.rebuild import Node, Storage
from sdformats.strided import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdformats.place import Place

WRAPPERS = ("model", "module", "params", "params_ema", "model_state_dict", "network", "weights")
MAX_DEPTH = 64
MAX_NODES = 2_000_000
_MAX_PLAIN, _PLAIN_DEPTH = 256, 8
"""Values and levels in a list or dict that is still taken for metadata."""
_LONGEST_TEXT = 1 << 20
_SHOWN = 8


@dataclass(slots=True)
class Content:
    """What a file holds.

    Attributes:
        tensors: by name, in the order of the pickle.
        metadata: plain values at the top. Text as it is; numbers, true, false, null, and lists and dicts of them as JSON.
        notes: what was left out or unwrapped.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sort_out(tree: object, place: Place) -> Content:
    """Find the tensors in what a pickle says.

    Raises:
        CorruptFile: two tensors have the same name, or a name is no valid text.
        UnsafeFile: the tree is too deep or too large, counting shared parts as often as they are met.
        UnsupportedFile: a tensor stands where it has no name.
    """
    content = Content()
    walk = _Walk(place)
    tree = _as_dict(tree)
    path: list[str] = []
    while isinstance(tree, dict) and (inner := _inner(tree, walk)) is not None:
        beside = {key: value for key, value in tree.items() if key != inner}
        _set_aside(beside, content, walk, f"beside {'.'.join([*path, inner])!r}", dicts=False)
        path.append(inner)
        tree = tree[inner]
    if path and path != ["state_dict"]:
        content.notes.append(f"the tensors are those under {'.'.join(path)!r}")
    top = _Top(content, walk, place, at_root=not path)
    top.take("", tree)
    top.tell()
    if not content.tensors:
        content.notes.append("holds no tensors")
    return content


def _inner(tree: dict[Any, Any], walk: _Walk) -> str | None:
    """Return the key under which alone the model is, if there is one."""
    if isinstance(tree.get("state_dict"), dict):
        return "state_dict"
    holders = [key for key, value in tree.items() if walk.count(value)]
    if len(holders) == 1 and holders[0] in WRAPPERS and isinstance(tree[holders[0]], dict):
        return str(holders[0])
    return None


def _as_dict(value: object) -> object:
    """Return the named tensors of a ParameterDict; anything else as it is."""
    if not isinstance(value, Node) or value.kind not in PARAMETER_LISTS or not isinstance(value.state, dict):
        return value
    held = value.state.get("_parameters")
    if not isinstance(held, dict):
        return value
    # Newer ones keep what is no Parameter as plain attributes, and list all names in _keys.
    names = value.state.get("_keys")
    extra = names if isinstance(names, dict) else {}
    return held | {key: value.state[key] for key in extra if key in value.state and key not in held}


class _Walk:
    """Visits everything under a value, within limits."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._nodes = MAX_NODES

    def count(self, value: object) -> int:
        """Return how many tensors there are in a value, wherever in it. Shared parts and cycles count once."""
        total = 0
        seen: set[int] = set()
        queue = [value]
        while queue:
            item = queue.pop()
            self.step()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, TensorRef):
                total += 1
            else:
                queue += children(item)
        return total

    def step(self, depth: int = 0) -> None:
        """Take note of one more value."""
        self._nodes -= 1
        if self._nodes < 0:
            raise self._place.unsafe("holds too many values", f"at most {MAX_NODES:,}, shared ones counted each time")
        if depth > MAX_DEPTH:
            raise self._place.unsafe("holds values nested too deeply", f"at most {MAX_DEPTH} levels")

    def plain(self, value: object, depth: int = 0) -> int:
        """Return how many plain values a value consists of, or more than the limit if it holds anything else."""
        self.step()
        if value is None or type(value) in (bool, int, float, str):
            return 1
        if isinstance(value, dict) and not all(isinstance(key, str | int) for key in value):
            return _MAX_PLAIN + 1
        if not isinstance(value, dict | list | tuple) or len(value) > _MAX_PLAIN or depth > _PLAIN_DEPTH:
            return _MAX_PLAIN + 1
        total = 1
        for child in children(value):
            total += self.plain(child, depth + 1)
            if total > _MAX_PLAIN:
                break
        return total


def children(value: object) -> Iterator[object]:
    """Return what a value directly holds, besides dict keys."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, Node):
        yield from (value.arguments, value.state, value.items)
    elif isinstance(value, Array) and value.tensor is not None:
        yield value.tensor


def _set_aside(beside: dict[Any, Any], content: Content, walk: _Walk, where: str, *, dicts: bool) -> None:
    """Turn plain values into metadata and tell of the rest."""
    left = []
    for key, value in beside.items():
        if not _take_plain(key, value, content, walk, dicts=dicts):
            tensors = walk.count(value)
            left.append(_shown(key) + _counted(tensors))
    if left:
        content.notes.append(f"left out {where}: {_listed(left)}")


def _take_plain(key: object, value: object, content: Content, walk: _Walk, *, dicts: bool) -> bool:
    if not isinstance(key, str) or not _is_text(key) or (isinstance(value, dict) and not dicts):
        return False
    if isinstance(value, str):
        text = value
    elif walk.plain(value) <= _MAX_PLAIN:
        text = json.dumps(value, ensure_ascii=False)
    else:
        return False
    if not _is_text(text) or len(text) > _LONGEST_TEXT:
        return False
    content.metadata[key] = text
    return True


def _is_text(text: str) -> bool:
    """Whether there are no half surrogate pairs in it, which no UTF-8 can say."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(key: object) -> str:
    if isinstance(key, bytes):
        key = key.decode("utf-8", "backslashreplace")
    return ascii(str(key)[:80])[1:-1]


def _counted(tensors: int) -> str:
    return f" ({tensors:,} tensor{'s' if tensors > 1 else ''})" if tensors else ""


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


class _Top:
    """Gives every tensor under a value its name."""

    def __init__(self, content: Content, walk: _Walk, place: Place, *, at_root: bool) -> None:
        self._content = content
        self._walk = walk
        self._place = place
        self._at_root = at_root
        self._left: list[str] = []

    def take(self, name: str, value: object, depth: int = 0) -> None:
        """Take everything under `value`, which is called `name`."""
        self._walk.step(depth)
        value = _as_dict(value)
        if isinstance(value, Array) and value.tensor is not None:
            value = value.tensor
        if isinstance(value, TensorRef):
            self._name(name, value)
        elif isinstance(value, dict):
            for key, item in value.items():
                plain = depth == 0 and self._at_root
                if not (plain and _take_plain(key, item, self._content, self._walk, dicts=True)):
                    self.take(_join(name, self._text(key, item, name), depth), item, depth + 1)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self.take(_join(name, str(index), depth), item, depth + 1)
        else:
            self._leave(name, value)

    def tell(self) -> None:
        """Note what was no tensor."""
        if self._left:
            self._content.notes.append(f"left out, as they are no tensors: {_listed(self._left)}")

    def _text(self, key: object, value: object, name: str) -> str:
        if isinstance(key, str | int):
            return str(key)
        if isinstance(key, bytes):
            return key.decode("utf-8", "backslashreplace")
        if self._walk.count(value):
            inside = f" in {_shown(name)!r}" if name else ""
            raise self._place.unsupported(f"has a tensor{inside} under a key that is the class {_shown(key)}", "text")
        return str(key)

    def _name(self, name: str, tensor: TensorRef) -> None:
        if not _is_text(name):
            raise self._place.corrupt(f"has the tensor name {_shown(name)!r}", "valid text")
        if name in self._content.tensors:
            raise self._place.corrupt(f"has two tensors named {_shown(name)!r}", "each name once")
        self._content.tensors[name] = tensor

    def _leave(self, name: str, value: object) -> None:
        tensors = self._walk.count(value)
        if isinstance(value, Storage):
            raise self._place.unsupported(f"holds a bare storage {_shown(name)!r}", "tensors")
        what = value.kind if isinstance(value, Node) else value if isinstance(value, Global) else None
        shown = (_shown(name) or "the whole") + (f" [{what}]" if what else "")
        self._left.append(shown + _counted(tensors))


def _join(name: str, part: str, depth: int) -> str:
    return f"{name}.{part}" if depth else part
