"""Block weights: a parameter that differs from block to block of the model, and for single tensors where rules say so.

`sdmerge.block_tables` says which block a tensor is in, `sdmerge.presets` holds the lists that go by a name, `sdmerge.rules` the
rules for single tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdmerge.block_tables import BASE, VAE, Block, Table, canonical, table
from sdmerge.errors import RequestError, nearest
from sdmerge.presets import PRESETS, preset_name
from sdmerge.rules import Rule, parse_rules

__all__ = ["BASE", "VAE", "Block", "Rule", "Table", "Weights", "parse_blocks", "table"]

_PRESET = "preset:"
_GRADIENT = "gradient:"
_COMPONENTS = ("unet", "te", "vae")
_FIELDS = ("value", *_COMPONENTS, "blocks", "rules")
_FORMS = (
    "expected a list of weights, preset:NAME, gradient:0,0.5,1 or BLOCK=WEIGHT pairs, as in IN00=0.3,OUT05-OUT08=0.7"
)


def parse_blocks(spec: Any, family: str) -> dict[str, float]:
    """Read the weights of a family's blocks.

    Args:
        spec: a list of numbers, or text with commas between them, for all blocks with or without BASE (26 or 25 for SD1,
            SD2 and the SDXL refiner, 20 or 19 for SDXL, which takes 26 or 25 too and lets go what it has no block for, 61
            for Flux, 24, 25, 38 or 39 for SD3); ``preset:NAME``; ``gradient:`` and two numbers or more, between which the
            network's blocks are interpolated from the first to the last; pairs ``IN00=0.3,OUT05-OUT08=0.7``, or a mapping of the
            same, where the last of several that name a block counts.
        family: one of `sdformats.layout.FAMILIES`.

    Returns:
        Weights by the tables' names of blocks; blocks that are not named are not there.

    Raises:
        RequestError: the wrong number of weights, an unknown preset or block, or no numbers.
    """
    return _resolved(_read(spec), table(family))


@dataclass(frozen=True, eq=False)
class Weights:
    """A parameter's value for each tensor of a model.

    What is said more closely counts: the plain value, above it the part of the model, above it the block, above it the last
    rule that fits. A preset's BASE makes way for `te`.

    Attributes:
        value: for every tensor that nothing else speaks of; None where something speaks of all.
        blocks: weights by block or range of blocks, a tuple of weights for all blocks, or ``preset:NAME``; see `parse_blocks`,
            which also names the texts that are understood here.
        unet: for the network, be it a UNet or a transformer.
        te: for the text encoders.
        vae: for the VAE, which no list of block weights reaches.
        rules: for single tensors.

    Raises:
        RequestError: something cannot be read.
    """

    value: float | None = None
    blocks: Mapping[str, float] | tuple[float, ...] | str = field(default_factory=dict)
    unet: float | None = None
    te: float | None = None
    vae: float | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("value", *_COMPONENTS):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else _number(given, name))
        object.__setattr__(self, "blocks", _read(self.blocks))
        object.__setattr__(self, "rules", parse_rules(self.rules))
        object.__setattr__(self, "_kept", {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        """What tells it from others; the order of blocks too, as the last one counts where ranges overlap."""
        blocks = tuple(self.blocks.items()) if isinstance(self.blocks, Mapping) else self.blocks
        return self.value, self.unet, self.te, self.vae, blocks, self.rules

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every value that it can take."""
        if isinstance(self.blocks, str):
            listed = _curve(self.blocks)
        else:
            listed = tuple(self.blocks.values()) if isinstance(self.blocks, Mapping) else self.blocks
        plain = (self.value, self.unet, self.te, self.vae)
        return (*(n for n in plain if n is not None), *listed, *(rule.ratio for rule in self.rules))

    def at(self, name: str, table: Table) -> float:
        """Return the value for one tensor.

        Args:
            name: its full name, in either spelling.
            table: the family's blocks.

        Raises:
            RequestError: as `check` does, or nothing speaks of the tensor.
        """
        listed = self._listed(table)
        block, component = table.block_of(name), table.component_of(name)
        found = getattr(self, component) if component in _COMPONENTS else None
        found = listed.get(block, self.value if found is None else found)
        for rule in self.rules:
            if rule.matches(name, block, table):
                found = rule.ratio
        if found is None:
            raise RequestError(f"{name!r}: has no weight, and lies in {block} (expected a value beside the blocks)")
        return found

    def check(self, table: Table) -> None:
        """Refuse what does not fit a family, or has no effect.

        Raises:
            RequestError: the wrong number of weights, a preset for another kind of model, a block that does not exist, a part
                of the model whose blocks all have weights of their own, or blocks without any weight.
        """
        listed = self._listed(table)
        for rule in self.rules:
            rule.check(table)
        for component in _COMPONENTS:
            given = getattr(self, component)
            inside = [row.name for row in table.rows if component in table.components_of(row.name)]
            if given is not None and all(block in listed for block in inside):
                said = inside[0] if len(inside) == 1 else "all of its blocks"
                raise RequestError(
                    f"{component}={given:g} has no effect, as {said} has a weight of its own (expected one of the two)"
                )
        if self.value is None:
            for row in table.rows:
                parts = table.components_of(row.name)
                if (
                    row.name not in listed
                    and row.name not in table.optional
                    and any(getattr(self, part) is None for part in parts)
                ):
                    raise RequestError(f"{row.name} has no weight (expected a value for what is not listed)")

    def idle(self, names: Iterable[str], table: Table) -> tuple[Rule, ...]:
        """Return the rules that fit none of a model's tensors."""
        placed = [(name, table.block_of(name)) for name in names] if self.rules else []
        return tuple(rule for rule in self.rules if not any(rule.matches(name, block, table) for name, block in placed))

    def notes(self, table: Table) -> tuple[str, ...]:
        """Say what is done to the weights so that they fit the family."""
        if isinstance(self.blocks, Mapping) or _is_gradient(self.blocks):
            return ()
        count = 26 if isinstance(self.blocks, str) else len(self.blocks)
        gone = [name for name in table.forms.get(count, ()) if name not in table.blocks]
        if not gone:
            return ()
        return (f"{table.family} has no {', '.join(gone)}: of {count} block weights made for SD1 these are let go",)

    def to_yaml(self) -> dict[str, Any]:
        """Return it as data that `from_yaml` reads."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("value", *_COMPONENTS)}
        found = {name: number for name, number in found.items() if number is not None}
        if self.blocks:
            spec = self.blocks
            found["blocks"] = dict(spec) if isinstance(spec, Mapping) else spec if isinstance(spec, str) else list(spec)
        if self.rules:
            found["rules"] = [str(rule) for rule in self.rules]
        return found

    @classmethod
    def from_yaml(cls, data: Any) -> Weights:
        """Read ``{value: 0.5, te: 0, blocks: "preset:GRAD_V", rules: ["*.attn1.*:0.2"]}``, any of it; or one number.

        Raises:
            RequestError: it is neither, or has a field that does not exist.
        """
        if not isinstance(data, Mapping):
            return cls(_number(data, "value"))
        for key in data:
            if key not in _FIELDS:
                raise RequestError(
                    f"{key!r} is no field of block weights (expected {', '.join(_FIELDS)}){nearest(str(key), _FIELDS)}"
                )
        given = {key: value for key, value in data.items() if value is not None}
        rules = given.get("rules", ())
        if not isinstance(rules, str | list | tuple):
            raise RequestError(f"rules is {rules!r} (expected a list of rules)")
        return cls(**{**given, "rules": parse_rules(rules)})

    def _listed(self, table: Table) -> Mapping[str, float]:
        """Return the weights by block, read once for each table."""
        kept: dict[Table, Mapping[str, float]] = self._kept  # type: ignore[attr-defined]
        if table not in kept:
            listed = _resolved(self.blocks, table)
            if isinstance(self.blocks, str) and self.te is not None:
                listed.pop(BASE, None)
            kept[table] = listed
        return kept[table]


def _read(spec: Any) -> Mapping[str, float] | tuple[float, ...] | str:
    """Read what can be read without knowing the family."""
    if isinstance(spec, Mapping):
        return _pairs(list(spec.items()))
    if isinstance(spec, list | tuple) and spec:
        return tuple(_number(one, f"block weight {i}") for i, one in enumerate(spec, 1))
    if not isinstance(spec, str):
        raise RequestError(f"block weights are {spec!r} ({_FORMS})")
    text = spec.strip()
    if text.lower().startswith(_PRESET):
        return _PRESET + preset_name(text[len(_PRESET) :])
    if _is_gradient(text.lower()):
        points = [_number(part.strip(), "a point of the gradient") for part in text[len(_GRADIENT) :].split(",")]
        if len(points) < 2:
            raise RequestError(f"{text!r} has one point (expected two or more, as in gradient:0,0.5,1)")
        return _GRADIENT + ",".join(map(repr, points))
    parts = re.split(r"\s*[,\n]\s*", text)
    if "=" in text:
        return _pairs([part.partition("=")[::2] for part in parts])
    if len(parts) == 1 and not _is_number(text):
        raise RequestError(f"block weights are {text!r} ({_FORMS})")
    return tuple(_number(part, f"block weight {i}") for i, part in enumerate(parts, 1))


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in pairs:
        word = "-".join(canonical(end) for end in str(key).split("-"))
        if word in found:
            raise RequestError(f"block weights name {word} twice (expected it once)")
        if not word or value == "":
            raise RequestError(f"block weights hold {key!r} without a block or a weight ({_FORMS})")
        found[word] = _number(value, f"weight of {word}")
    return found


def _resolved(spec: Mapping[str, float] | tuple[float, ...] | str, table: Table) -> dict[str, float]:
    if isinstance(spec, Mapping):
        return {block: weight for word, weight in spec.items() for block in table.expand(word)}
    if isinstance(spec, str):
        if _is_gradient(spec):
            return _interpolated(_curve(spec), table)
        values = _curve(spec)
        if len(values) not in table.forms:
            raise RequestError(
                f"{spec} is a curve over the blocks of a UNet, which {table.family} has not (expected a list or pairs)"
            )
    else:
        values = spec
    names = table.forms.get(len(values))
    if names is None:
        counts = " or ".join(map(str, table.forms))
        raise RequestError(f"{len(values)} block weights for {table.family} (expected {counts})")
    return {name: weight for name, weight in zip(names, values, strict=True) if name in table.blocks}


def _is_gradient(spec: object) -> bool:
    return isinstance(spec, str) and spec.startswith(_GRADIENT)


def _curve(spec: str) -> tuple[float, ...]:
    """Return a preset's weights, or a gradient's points."""
    if _is_gradient(spec):
        return tuple(float(part) for part in spec.removeprefix(_GRADIENT).split(","))
    return tuple(PRESETS[spec.removeprefix(_PRESET)])


def _interpolated(points: tuple[float, ...], table: Table) -> dict[str, float]:
    """Lay points over the network's blocks at equal distances, straight lines between them."""
    blocks = [row.name for row in table.rows if row.name != BASE and "unet" in table.components_of(row.name)]
    found = {}
    for i, block in enumerate(blocks):
        at = i * (len(points) - 1) / (len(blocks) - 1)
        low = min(int(at), len(points) - 2)
        found[block] = points[low] + (at - low) * (points[low + 1] - points[low])
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(value: Any, what: str) -> float:
    number = math.nan
    if isinstance(value, str) and _is_number(value):
        number = float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise RequestError(f"{what} is too large a number (expected a finite one)") from None
    if not math.isfinite(number):
        raise RequestError(f"{what} is {value!r} (expected a finite number)")
    return number
