"""Recipes as text: YAML that people write, and the JSON in an output's metadata, which has the same form.

::

    models:
      a: a.safetensors                  # paths count from the recipe's folder
      b: {path: b.ckpt, sha256: 6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa}
      c: c.safetensors
    set: {alpha: 0.7}                   # what `sdmerge run --set alpha=0.5` may change
    merge:
      method: add_difference
      models: [a, {method: weighted_sum, models: [b, c], parameters: {alpha: 0.3}}, c]
      parameters: {alpha: $alpha}       # or {value: 0.7, te: 0, blocks: "preset:GRAD_V", rules: ["*.attn2.*:0.2"]}
                                        # a model with adapters: {model: b, adapters: [{adapter: l.safetensors, strength: 0.8}]}
    dtype: fp16                         # and other options of a merge: missing, ema, overflow, vae, family
    output: d.safetensors

A file with ``merge_method`` is read as a recipe of mergekit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sdmerge import method as methods
from sdmerge.blocks import Weights
from sdmerge.errors import RequestError, nearest
from sdmerge.options import RECIPE_OPTIONS
from sdmerge.recipe import LABELS, Addition, Input, Merge, Model, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdmerge.method import Parameter

VERSION = 1
_DEEPEST = 32
_LARGEST = 1 << 20
_KEYS = ("version", "models", "set", "merge", "output", *RECIPE_OPTIONS)
_MERGE_KEYS = ("method", "models", "base", "parameters")
_INPUT_KEYS = ("path", "sha256")
_BAKED_KEYS = ("model", "adapters")
_ADAPTER_KEYS = ("adapter", "strength")


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file; the paths in it count from its folder.
        changes: values for the names under ``set``.

    Raises:
        RequestError: what is wrong with it, and where.
    """
    data = read_yaml(path)
    try:
        if isinstance(data, dict) and "merge_method" in data:
            from sdmerge import mergekit

            data = mergekit.translated(data)
        return parse(data, path.parent, changes)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        RequestError: it cannot be read, or is too large to be settings.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise RequestError(f"{path}: is too large (expected a YAML text of at most 1 MiB)")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    return data


def parse(data: Any, folder: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Turn a recipe's data into nodes; see `load`.

    Args:
        data: what YAML or JSON gave.
        folder: where relative paths count from.
        changes: values for the names under ``set``.

    Raises:
        RequestError: what is wrong with it.
    """
    _check_keys("the recipe", data, _KEYS, needed=("merge",))
    if data.get("version", VERSION) != VERSION:
        raise RequestError(f"version is {data['version']!r} (expected {VERSION}); a newer sdmerge may know it")
    reader = _Reader(folder, _settings(data, changes or {}))
    reader.add_models(data.get("models") or {})
    root = reader.node(data["merge"])
    if isinstance(root, Model) and not root.adapters:
        raise RequestError("merge is only a model (expected a method with its models, or a model with adapters)")
    options = {name: reader.set(data[name]) for name in RECIPE_OPTIONS if data.get(name) is not None}
    if "vae" in options:
        options["vae"] = reader.path(options["vae"])
    output = reader.set(data.get("output"))
    return Recipe(root, reader.inputs, options, None if output is None else reader.path(output))


def as_data(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as `parse` reads it, with file names for paths.

    Args:
        recipe: what to write.
        options: the run's values of `RECIPE_OPTIONS`; what is None is left out.
    """
    chosen = {name: options[name] for name in RECIPE_OPTIONS if options.get(name) is not None}
    if "vae" in chosen:
        chosen["vae"] = Path(chosen["vae"]).name
    models = {name: recipe.inputs[name].path.name for name in (*recipe.ids, *recipe.adapters)}
    return {"version": VERSION, "models": models, "merge": _node_data(recipe.merge), **chosen}


def _node_data(node: Model | Merge) -> Any:
    if isinstance(node, Model):
        added = [{"adapter": one.id, "strength": _value_data(one.strength)} for one in node.adapters]
        return {"model": node.id, "adapters": added} if added else node.id
    operands = [_node_data(operand) for operand in node.operands]
    base = {"base": operands.pop()} if node.based else {}
    values = {name: _value_data(value) for name, value in node.values.items()}
    return {"method": node.method.name, "models": operands, **base, "parameters": values}


def _value_data(value: Any) -> Any:
    if isinstance(value, Weights):
        return value.to_yaml()
    if isinstance(value, tuple):
        return [_value_data(one) for one in value]
    return value


def read_value(parameter: Parameter, raw: Any) -> Any:
    """Turn a parameter's data into its value: block weights from a mapping, a list or the name of a preset.

    Raises:
        RequestError: it is none of these.
    """
    if parameter.kind is tuple:
        many = raw if isinstance(raw, list | tuple) else [raw]
        return tuple(_weights(parameter, one) for one in many)
    if parameter.kind is float:
        return _weights(parameter, raw)
    return raw


def _weights(parameter: Parameter, raw: Any) -> Any:
    if isinstance(raw, dict):
        return Weights.from_yaml(raw)
    if isinstance(raw, list) or (isinstance(raw, str) and raw.lower().startswith("preset:")):
        return Weights.from_yaml({"value": _fallback(parameter), "blocks": raw})
    return raw


def _fallback(parameter: Parameter) -> float:
    if parameter.kind is float and not parameter.required:
        return float(parameter.default)
    raise RequestError(
        f"{parameter.name} has no default for what lies in no block (expected a value beside the blocks)"
    )


class _Reader:
    """Reads nodes, and collects the inputs that they name."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.inputs: dict[str, Input] = {}
        self._folder = folder
        self._settings = settings
        self._depth = 0

    def path(self, text: Any) -> Path:
        """Return a path as the recipe means it."""
        if not isinstance(text, str) or not text or "\0" in text:
            raise RequestError(f"{text!r} is no path")
        return self._folder / Path(text).expanduser()

    def set(self, raw: Any) -> Any:
        """Put in what ``$name`` stands for, however deep."""
        if isinstance(raw, str) and raw.startswith("$"):
            name = raw[1:].strip("{}")
            if name not in self._settings:
                raise RequestError(f"{raw} is not under set{nearest(name, self._settings)}")
            return self._settings[name]
        if isinstance(raw, list):
            return [self._deeper(self.set, one) for one in raw]
        if isinstance(raw, dict):
            return {key: self._deeper(self.set, one) for key, one in raw.items()}
        return raw

    def add_models(self, data: Any) -> None:
        """Take the inputs under ``models``."""
        if not isinstance(data, dict):
            raise RequestError("models is no mapping (expected name: path)")
        for name, value in data.items():
            self.inputs[str(name)] = self._input(value)

    def node(self, raw: Any) -> Model | Merge:
        """Read a model or a merge."""
        if isinstance(raw, str):
            return self._model(str(self.set(raw)))
        if isinstance(raw, dict) and "method" not in raw and "path" in raw:
            name = self._free_label()
            self.inputs[name] = self._input(raw)
            return Model(name)
        if isinstance(raw, dict) and "adapters" in raw:
            return self._with_adapters(raw)
        _check_keys("a merge", raw, _MERGE_KEYS, needed=("method", "models"))
        if not isinstance(raw["models"], list):
            raise RequestError(f"models of {raw['method']} is no list")
        found = methods.find(str(self.set(raw["method"])))
        parameters = raw.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise RequestError(f"parameters of {found.name} is no mapping (expected name: value)")
        values = {str(n): read_value(found.parameter(str(n)), self.set(v)) for n, v in parameters.items()}
        operands = [self._deeper(self.node, one) for one in raw["models"]]
        base = None if raw.get("base") is None else self._deeper(self.node, raw["base"])
        return Merge.of(found.name, operands, values, base)

    def _with_adapters(self, raw: dict[str, Any]) -> Model:
        """Read a model with adapters baked in."""
        _check_keys("a model with adapters", raw, _BAKED_KEYS, needed=_BAKED_KEYS)
        model = self.node(raw["model"])
        if not isinstance(model, Model) or model.adapters:
            raise RequestError("adapters belong to a model (expected its name or path as model)")
        if not isinstance(raw["adapters"], list) or not raw["adapters"]:
            raise RequestError("adapters is no list (expected names, paths, or mappings with adapter and strength)")
        return Model(model.id, tuple(self._addition(one) for one in raw["adapters"]))

    def _addition(self, raw: Any) -> Addition:
        if isinstance(raw, str):
            return Addition(self._model(str(self.set(raw))).id)
        _check_keys("an adapter", raw, _ADAPTER_KEYS, needed=("adapter",))
        name = self._deeper(self.node, raw["adapter"])
        if not isinstance(name, Model) or name.adapters:
            raise RequestError("adapter is no file (expected a name or a path)")
        strength = self.set(raw.get("strength", 1.0))
        if isinstance(strength, dict):
            return Addition(name.id, Weights.from_yaml(strength))
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise RequestError(f"strength is {strength!r} (expected a number, or block weights)")
        return Addition(name.id, float(strength))

    def _deeper(self, read: Any, raw: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise RequestError(f"nested more than {_DEEPEST} deep")
        try:
            return read(raw)
        finally:
            self._depth -= 1

    def _model(self, text: str) -> Model:
        if text in self.inputs:
            return Model(text)
        path = self.path(text)
        if not path.exists() and not ("/" in text or "\\" in text or "." in text):
            raise RequestError(f"there is no model {text!r} under models, and no such file{nearest(text, self.inputs)}")
        known = next((name for name, one in self.inputs.items() if one.path == path), None)
        name = known or self._free_label()
        self.inputs.setdefault(name, Input(path))
        return Model(name)

    def _input(self, raw: Any) -> Input:
        raw = self.set(raw)
        if isinstance(raw, str):
            return Input(self.path(raw))
        _check_keys("a model", raw, _INPUT_KEYS, needed=("path",))
        sha256 = raw.get("sha256")
        if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64):
            raise RequestError(f"sha256 is {sha256!r} (expected 64 hexadecimal digits)")
        return Input(self.path(raw["path"]), None if sha256 is None else sha256.lower())

    def _free_label(self) -> str:
        free = (label for label in LABELS if label not in self.inputs and label.lower() not in self.inputs)
        name = next(free, None)
        if name is None:
            raise RequestError(f"more than {len(LABELS)} models without a name; name them under models")
        return name


def _settings(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = data.get("set") or {}
    if not isinstance(settings, dict):
        raise RequestError("set is no mapping (expected name: value)")
    for name in changes:
        if name not in settings:
            raise RequestError(f"the recipe has nothing to set named {name!r}{nearest(name, settings)}")
    return {**settings, **changes}


def _check_keys(what: str, data: Any, known: Iterable[str], needed: Iterable[str]) -> None:
    if not isinstance(data, dict):
        raise RequestError(f"{what} is {type(data).__name__} (expected a mapping with {', '.join(needed)})")
    for key in data:
        if key not in known:
            raise RequestError(f"{what} has no key {key!r}; it has: {', '.join(known)}{nearest(str(key), known)}")
    for key in needed:
        if key not in data:
            raise RequestError(f"{what} lacks {key!r}")
