"""What the command line says about parameters: ``-p``, block weights, rules, parts of the model, sweeps."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdmerge.method import Method, Parameter

_LARGEST_SWEEP = 100

weight_options = options.together(
    click.option("--blocks", "block_weights", multiple=True, metavar="[NAME=]WEIGHTS",
                 help="Block weights: 0,0.1,... or preset:GRAD_V or IN00=0.3,OUT05-OUT08=0.7; `sdmerge blocks` shows them."),
    click.option("--rule", "rules", multiple=True, metavar="[NAME=]RULE",
                 help='Single tensors: "IN00-IN05:attn2:0.3" or "*.attn1.*:0.2". The last that fits counts.'),
    click.option("--unet", type=float, metavar="W", help="Weight of the UNet (or transformer)."),
    click.option("--te", type=float, metavar="W", help="Weight of the text encoders."),
    click.option("--vae", metavar="W|FILE", help="Weight of the VAE; or a file to take the VAE from."),
    click.option("--sweep", "sweeps", multiple=True, metavar="NAME=FROM:TO:STEP",
                 help="Several outputs over one read of the inputs; also NAME=0.2,0.5."),
)  # fmt: skip
"""What varies a method's parameters."""


def parsed(method: Method, parameters: Iterable[str]) -> dict[str, Any]:
    """Read ``-p name=value`` into values of the parameters' types.

    Raises:
        RequestError: no such parameter, or another type.
    """
    values = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"-p {text} says no value (expected name=value)")
        values[name.strip()] = _typed(method.parameter(name.strip()), value.strip())
    return values


def _typed(parameter: Parameter, text: str) -> Any:
    flags = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        if parameter.kind is bool:
            return flags[text.lower()]
        if parameter.kind is int:
            return int(text)
        if parameter.kind is tuple:
            return tuple(float(part) for part in text.split(","))
        return float(text) if parameter.kind is float else text
    except (ValueError, KeyError):
        raise RequestError(f"{parameter.name} is {text!r} (expected {parameter.expects})") from None


def combined(method: Method, count: int, values: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Put block weights, rules and parts into the values; leave in ``given["vae"]`` only what names a file.

    A NAME is a parameter, or one model's number of a parameter that has one for each: ``weights.B``. Without a NAME the
    method's first weight is meant, as it is by ``--unet``, ``--te`` and ``--vae``.

    Raises:
        RequestError: the method has no such weight, or a value cannot be read.
    """
    fields: dict[str, dict[str, Any]] = {}
    for text in given.pop("block_weights"):
        name, spec = _named(method, text)
        fields.setdefault(name, {})["blocks"] = spec
    for text in given.pop("rules"):
        name, rule = _named(method, text)
        fields.setdefault(name, {}).setdefault("rules", []).append(rule)
    parts = {"unet": given.pop("unet"), "te": given.pop("te"), "vae": _number(given.get("vae"))}
    if parts["vae"] is not None:
        given["vae"] = None
    for part, number in parts.items():
        if number is not None:
            fields.setdefault(_main(method).name, {})[part] = number
    found = dict(values)
    for name, said in fields.items():
        _put(method, count, found, name, said)
    return found


def _named(method: Method, text: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    known = [parameter.name for parameter in method.parameters]
    if equals and name.strip().partition(".")[0] in known:
        return name.strip(), rest.strip()
    return _main(method).name, text


def _main(method: Method) -> Parameter:
    if method.weight is None:
        raise RequestError(f"{method.name} has no parameter that may differ from block to block")
    return method.weight


def _put(method: Method, count: int, values: dict[str, Any], name: str, said: Mapping[str, Any]) -> None:
    from sdmerge.blocks import Weights
    from sdmerge.recipe import LABELS

    stem, dot, letter = name.partition(".")
    parameter = method.parameter(stem)
    if parameter.kind is not tuple:
        plain = values.get(stem, None if parameter.required else parameter.default)
        values[stem] = Weights.from_yaml({"value": plain, **said})
        return
    place = LABELS.find(letter) if dot and len(letter) == 1 else -1
    if not 0 <= place < count:
        raise RequestError(f"{stem} has one number for each model (expected one of them, as in {stem}.B=...)")
    numbers = list(parameter.checked(values.get(stem, parameter.default if not parameter.required else ()), count))
    numbers[place] = Weights.from_yaml({"value": numbers[place], **said})
    values[stem] = tuple(numbers)


def _number(text: str | None) -> float | None:
    if text is None or Path(text).exists():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``name=value``, the value as YAML has it.

    Raises:
        RequestError: no value.
    """
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise RequestError(f"{text!r} sets nothing (expected name=value)")
    return found


def swept(texts: Iterable[str]) -> dict[str, list[float]]:
    """Read ``name=from:to:step`` (both ends included) and ``name=value,value``. Steps are decimal, so 0:1:0.1 is exact.

    Raises:
        RequestError: it is neither, or asks for too much.
    """
    found = {}
    for text in texts:
        name, _, spec = text.partition("=")
        try:
            if ":" in spec:
                low, high, step = (Decimal(part) for part in spec.split(":"))
                count = int((high - low) / step) + 1
                values = [float(low + i * step) for i in range(min(count, _LARGEST_SWEEP + 1))]
            else:
                values = [float(Decimal(part)) for part in spec.split(",")]
        except (ValueError, InvalidOperation, ArithmeticError, OverflowError):
            values = []
        if not values or not name.strip():
            raise RequestError(f"--sweep {text} is no sweep (expected name=from:to:step or name=value,value)")
        if len(values) > _LARGEST_SWEEP:
            raise RequestError(f"--sweep {text} asks for more than {_LARGEST_SWEEP} outputs")
        found[name.strip()] = values
    return found
