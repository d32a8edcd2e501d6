"""Hypernetworks: small networks in front of the keys and values of every attention layer of one width.

A layer that reads a context of that width reads ``x + s · K(x)`` for its keys and ``x + s · V(x)`` for its values instead.

::

    a1111     {width: (k, v), …, "step": …, "layer_structure": [1, 2, 1], "activation_func": …, …}
              k and v are state dicts of one torch Sequential, ``linear.I.weight`` and ``linear.I.bias``, where I counts all of
              its slots: each linear layer, then its activation, its norm and its dropout, where it has one
    novelai   {width: (k, v), …} and nothing else; ``linear1`` and ``linear2``, without anything between

A safetensors file holds the same tensors under the paths to them (``768.0.linear.0.weight`` is in k, ``768.1.…`` in v) and
the same settings as metadata: text as it is, all else as JSON. That is what a pickle looks like to `contents`, so both are
read here in one way.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.errors import CorruptFile, UnsupportedFile
from sdformats.kind import Kind, Marked
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.torch_pickle import Tree

_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""The widths of the text that cross-attention reads."""
_NAME = re.compile(r"(\d{1,6})\.([01])\.(linear(?:[12]|\.\d{1,3}))\.(weight|bias)")
_OLD_DROPOUT = 0.3
_NO_TEXT = "null"
_OWN = ("format",)
"""What safetensors' writers put beside the settings, and is none of them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What A1111 keeps beside the networks, under the names it has there. The defaults are what a missing key means.

    Attributes:
        layer_structure: the width behind each layer as a multiple of the context's, beginning with that of the context.
        activation_func: a torch activation in lower case, ``swish`` for Hardswish; None or ``linear``: none.
        activate_output: whether it also stands behind the last layer.
        dropout_structure: the share of numbers that is dropped behind each layer in training, with one more 0 in front;
            None: as `use_dropout` and `last_layer_dropout` say, 0.3.
    """

    step: int = 0
    name: str | None = None
    layer_structure: tuple[int | float, ...] = (1, 2, 1)
    activation_func: str | None = None
    is_layer_norm: bool = False
    weight_initialization: str | None = "Normal"
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    activate_output: bool = True
    use_dropout: bool = False
    dropout_structure: tuple[int | float, ...] | None = None
    last_layer_dropout: bool = False
    optional_info: str | None = None

    @property
    def activation(self) -> str | None:
        """The activation that there is."""
        return None if self.activation_func in (None, "linear") else self.activation_func

    @property
    def dropouts(self) -> tuple[int | float, ...]:
        """The share dropped behind each layer, with a 0 in front, as A1111 reads files that only say whether."""
        count = len(self.layer_structure)
        if self.dropout_structure is not None or not self.use_dropout:
            return self.dropout_structure or (0,) * count
        last = _OLD_DROPOUT if self.last_layer_dropout else 0
        return (0, *(_OLD_DROPOUT,) * (count - 3), last, 0)[:count]

    def slots(self) -> Iterator[tuple[str, int]]:
        """Yield what stands in a network, one after the other, each with the number of the layer it belongs to."""
        last = len(self.layer_structure) - 2
        for layer in range(last + 1):
            yield "linear", layer
            if self.activation is not None and (layer < last or self.activate_output):
                yield "activation", layer
            if self.is_layer_norm:
                yield "norm", layer
            if self.dropouts[layer + 1] > 0:
                yield "dropout", layer

    def width(self, context: int, layer: int) -> int:
        """Return the width in front of a layer."""
        return int(context * self.layer_structure[layer])


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight (out, in), bias (out,)."""

    weight: Ref
    bias: Ref


@dataclass(frozen=True)
class Norm:
    """A layer norm over all of (width,)."""

    weight: Ref
    bias: Ref


@dataclass(frozen=True)
class Activation:
    """An activation, by A1111's name."""

    name: str


@dataclass(frozen=True)
class Dropout:
    """What is dropped in training; nothing, when it is used."""

    share: float


Slot = Linear | Norm | Activation | Dropout
Network = tuple[Slot, ...]


@dataclass(frozen=True)
class Hypernetwork:
    """Everything that a file says.

    Attributes:
        networks: by width of the context, those for the keys and for the values.
        settings: what A1111 keeps; NovelAI's files have the defaults.
        extras: other texts.
        notes: what a user should know about how it was read.
    """

    networks: Mapping[int, tuple[Network, Network]]
    settings: Settings
    extras: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bends(self) -> str | None:
        """What makes it more than a linear map, in words; None where it is one."""
        found = []
        if any(kind == "activation" for kind, _ in self.settings.slots()):
            found.append(f"the activation {self.settings.activation}")
        if self.settings.is_layer_norm:
            found.append("layer norms")
        return " and ".join(found) or None


def read_hypernetwork(source: TensorSource) -> Hypernetwork:
    """Read a hypernetwork, but for its weights.

    Raises:
        CorruptFile: settings and tensors contradict each other.
        UnsupportedFile: it is a variant that neither A1111 nor NovelAI knows.
    """
    settings = _settings(source)
    widths: dict[int, None] = {}
    for name in source.specs:
        found = _NAME.fullmatch(name)
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


def write_a1111(record: Hypernetwork) -> Written:
    """Return A1111's tensors, settings and tree. All settings are written: readers disagree about what a missing one means."""
    settings = {item.name: getattr(record.settings, item.name) for item in fields(Settings)}
    settings["dropout_structure"] = record.settings.dropouts
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return _written(record, "linear.{}", {**record.extras, **texts}, {**record.extras, **settings})


def write_novelai(record: Hypernetwork) -> Written:
    """Return NovelAI's tensors and tree.

    Raises:
        CannotHold: it is no pair of linear layers of twice the width.
    """
    plain = [kind for kind, _ in record.settings.slots() if kind != "dropout"] == ["linear", "linear"]
    if not plain or record.settings.layer_structure != (1, 2, 1):
        raise CannotHold(
            "the layout novelai holds two linear layers with nothing between them, the first of twice the width",
            advice="choose --to a1111",
        )
    return _written(record, "linear{}", {}, {})


def _written(record: Hypernetwork, form: str, texts: Mapping[str, str], beside: Mapping[str, Tree]) -> Written:
    tensors: dict[str, Ref] = {}
    tree: dict[Any, Tree] = {}
    numbered = form == "linear.{}"
    for width, pair in record.networks.items():
        sides: list[Tree] = []
        for side, network in enumerate(pair):
            inner: dict[str, Tree] = {}
            placed = enumerate(network) if numbered else enumerate((s for s in network if isinstance(s, Linear)), 1)
            for index, slot in placed:
                if not isinstance(slot, Linear | Norm):
                    continue
                for part, ref in (("weight", slot.weight), ("bias", slot.bias)):
                    key = f"{form.format(index)}.{part}"
                    name = f"{width}.{side}.{key}"
                    tensors[name] = ref
                    inner[key] = TensorNamed(name)
            sides.append(inner)
        tree[width] = tuple(sides)
    return Written(tensors, texts, tree={**tree, **beside})


WRITERS: Mapping[str, Callable[[Hypernetwork], Written]] = {"a1111": write_a1111, "novelai": write_novelai}
"""By layout; both go into a file for torch or into safetensors."""


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


def _family(looks: Looks) -> str | None:
    found = {_CONTEXTS[width] for name in looks.specs if (width := int(name.partition(".")[0])) in _CONTEXTS}
    return found.pop() if len(found) == 1 else None


def _some_variant(looks: Looks) -> bool:
    return any(".linear" in name for name in looks.specs) and any(not _NAME.fullmatch(name) for name in looks.specs)


KIND = Kind(
    name="hypernetwork",
    title="a hypernetwork",
    layouts=(
        Marked(name="a1111", marks=(r"^\d{1,6}\.[01]\.linear\.\d{1,3}\.(weight|bias)$",)),
        Marked(name="novelai", marks=(r"^\d{1,6}\.[01]\.linear[12]\.(weight|bias)$",)),
        Marked(name="unknown variant", marks=(r"^\d{1,6}\.[01]\.",), fits=_some_variant),
    ),
    family=_family,
)
