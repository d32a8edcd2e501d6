"""Read a hypernetwork in any of its layouts: settings say which tensors there must be, and there may be no others."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile, UnsupportedFile
from sdformats.hypernetwork.kind import NAME
from sdformats.hypernetwork.record import Activation, Dropout, Hypernetwork, Linear, Network, Norm, Settings, Slot
from sdformats.views import Ref, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.tensor import TensorSource

_NO_TEXT = "null"
_OWN = ("format",)
"""What safetensors' writers put beside the settings, and is none of them."""


def read_hypernetwork(source: TensorSource) -> Hypernetwork:
    """Read a hypernetwork, but for its weights.

    Raises:
        CorruptFile: settings and tensors contradict each other.
        UnsupportedFile: it is a variant that neither A1111 nor NovelAI knows.
    """
    settings = _settings(source)
    widths: dict[int, None] = {}
    for name in source.specs:
        found = NAME.fullmatch(name)
        if found is None:
            raise UnsupportedFile("is no part of a hypernetwork that A1111 or NovelAI write", path=source.path, key=name,
                                  expected="WIDTH.0 or .1, then linear.N, linear1 or linear2, then weight or bias")  # fmt: skip
        widths[int(found[1])] = None
    reader = _Reader(source, settings, novelai=_is_novelai(source))
    networks = {width: (reader.network(width, 0), reader.network(width, 1)) for width in widths}
    reader.check_all_used()
    known = {*(item.name for item in fields(Settings)), *_OWN}
    extras = {key: text for key, text in source.metadata.items() if key not in known}
    return Hypernetwork(networks, settings, extras, source.notes)


def _is_novelai(source: TensorSource) -> bool:
    return any(re.search(r"\.linear[12]\.", name) for name in source.specs)


class _Reader:
    """Finds the tensors of each network, and keeps account of them."""

    def __init__(self, source: TensorSource, settings: Settings, *, novelai: bool) -> None:
        self._source = source
        self._settings = settings
        self._novelai = novelai
        self._used: set[str] = set()

    def network(self, width: int, side: int) -> Network:
        """Return one of the two networks for a width."""
        found: list[Slot] = []
        for index, (kind, layer) in enumerate(self._settings.slots()):
            after = self._settings.width(width, layer + 1)
            if kind == "activation":
                found.append(Activation(str(self._settings.activation)))
            elif kind == "dropout":
                found.append(Dropout(self._settings.dropouts[layer + 1]))
            elif kind == "norm":
                found.append(Norm(*self._pair(width, side, index, (after,))))
            else:
                found.append(Linear(*self._pair(width, side, index, (after, self._settings.width(width, layer)))))
        return tuple(found)

    def _pair(self, width: int, side: int, index: int, shape: tuple[int, ...]) -> tuple[Ref, Ref]:
        stem = f"{width}.{side}.linear{index + 1}" if self._novelai else f"{width}.{side}.linear.{index}"
        return self._take(f"{stem}.weight", shape), self._take(f"{stem}.bias", shape[:1])

    def _take(self, name: str, shape: tuple[int, ...]) -> Ref:
        spec = self._source.specs.get(name)
        if spec is None or spec.shape != shape or not spec.dtype.is_float:
            held = "is missing" if spec is None else f"is {spec}"
            raise CorruptFile(held, path=self._source.path, key=name, expected=f"{list(shape)}, {self._because()}")
        self._used.add(name)
        return Stored(self._source, name)

    def check_all_used(self) -> None:
        """Refuse tensors that have no place."""
        for name in self._source.specs:
            if name not in self._used:
                raise CorruptFile("has no place", path=self._source.path, key=name, expected=f"none, {self._because()}")

    def _because(self) -> str:
        chosen = self._settings
        said = [f"layers {list(chosen.layer_structure)}", f"activation {chosen.activation or 'none'}"]
        said += ["not after the last"] if chosen.activation and not chosen.activate_output else []
        said += ["norms"] if chosen.is_layer_norm else []
        said += [f"dropout {list(chosen.dropouts)}"] if any(chosen.dropouts) else []
        return f"as its settings say: {', '.join(said)}"


def _settings(source: TensorSource) -> Settings:
    """Read what there is of the settings."""
    given: dict[str, Any] = {}
    for item in fields(Settings):
        text = source.metadata.get(item.name)
        if text is None:
            continue
        value, expected = _PARSERS[str(item.type)](text)
        if expected is not None:
            raise CorruptFile(f"is {text[:40]!r}", path=source.path, key=item.name, expected=expected)
        if value is not None or "None" in str(item.type):
            given[item.name] = value
    chosen = Settings(**given)
    structure, dropouts = chosen.layer_structure, chosen.dropouts
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1 or not all(0 < size <= 1024 for size in structure):
        raise CorruptFile(f"is {list(structure)}", path=source.path, key="layer_structure",
                          expected="multiples of the width that begin and end with 1")  # fmt: skip
    if len(dropouts) != len(structure) or not all(0 <= share < 1 for share in dropouts):
        raise CorruptFile(f"is {list(dropouts)}", path=source.path, key="dropout_structure",
                          expected=f"{len(structure)} numbers from 0 to below 1")  # fmt: skip
    return chosen


def _text(text: str) -> tuple[Any, str | None]:
    return (None if text == _NO_TEXT else text), None


def _json(text: str, kinds: tuple[type, ...], expected: str) -> tuple[Any, str | None]:
    """Return a number, a truth value or nothing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, expected
    return (value, None) if value is None or type(value) in kinds else (None, expected)


def _numbers(text: str) -> tuple[Any, str | None]:
    value, expected = _json(text, (list,), "a list of numbers")
    if value is None:
        return None, expected
    plain = all(type(one) in (int, float) for one in value)
    return (tuple(value), None) if plain else (None, "a list of numbers")


_PARSERS: Mapping[str, Callable[[str], tuple[Any, str | None]]] = {
    "int": lambda text: _json(text, (int,), "a whole number"),
    "bool": lambda text: _json(text, (bool,), "true or false"),
    "str | None": _text,
    "tuple[int | float, ...]": _numbers,
    "tuple[int | float, ...] | None": _numbers,
}
"""By a setting's type: what takes a text and returns its value (None: nothing), and what was expected where it is none."""


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON.

    Raises:
        See `read_hypernetwork`.
    """
    record = read_hypernetwork(source)
    settings = record.settings
    return {
        "widths": list(record.networks),
        "layers": list(settings.layer_structure),
        "activation": settings.activation,
        "activate_output": settings.activation is not None and settings.activate_output,
        "layer_norm": settings.is_layer_norm,
        "dropout": list(settings.dropouts) if any(settings.dropouts) else None,
        "linear": record.bends is None,
        "name": settings.name,
        "step": settings.step,
        "trained_on": settings.sd_checkpoint_name or settings.sd_checkpoint,
    }
