"""mergekit's YAML, read as a recipe of ours.

Its models are single files or diffusers folders. A list of numbers is a gradient: it is laid over the blocks of the network
from the first to the last, and its first number is for everything else. A list of filters names tensors by a part of
their names. What has no meaning here is refused by name, never passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmerge.errors import RequestError, nearest
from sdmerge.method import find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdmerge.method import Method

_METHODS = {
    "linear": "linear",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "multislerp": "multislerp",
    "karcher": "karcher",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "della": "della",
    "della_linear": "della_linear",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs_ties",
    "model_stock": "model_stock",
    "sce": "sce",
    "nearswap": "nearswap",
    "arcee_fusion": "arcee_fusion",
    "ram": "ram",
    "ramplus_tl": "ram_plus",
}
_NAMES = {
    "weight": "weights",
    "lambda": "lam",
    "normalize_weights": "normalize",
    "eps": "epsilon",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
    "max_iter": "iterations",
    "tol": "tolerance",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"density": 1.0}
    for name in ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
}
"""Where mergekit's defaults are not ours."""
_TOP = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "name",
    "tokenizer_source",
    "slices",
)
_IGNORED = ("int8_mask",)
_FROM_BASE = ("slerp", "nearswap")
"""Methods whose base model is our A."""
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def translated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return our recipe's data for a recipe of mergekit.

    Args:
        data: what its YAML holds.

    Raises:
        RequestError: it uses what has no meaning for single files, or is not known.
    """
    for key in data:
        if key not in _TOP:
            raise RequestError(f"{key!r} is not understood here{nearest(str(key), _TOP)}")
    for key in ("slices", "tokenizer_source"):
        if data.get(key) is not None:
            raise RequestError(f"{key} is about language models' layers and has no meaning here; name whole models")
    named = str(data["merge_method"])
    if named not in _METHODS:
        raise RequestError(f"merge_method {named!r} is not known here{nearest(named, _METHODS)}")
    method = find(_METHODS[named])
    base = None if data.get("base_model") is None else _path(data["base_model"])
    listed = [_entry(one) for one in _list(data.get("models"))]
    shared = _mapping(data.get("parameters"), "parameters")
    models, base = _in_order(method, listed, base)
    merge: dict[str, Any] = {"method": method.name, "models": [model for model, _ in models]}
    if base is not None and method.base != "no":
        merge["base"] = base
    merge["parameters"] = _parameters(method, [own for _, own in models], shared)
    found: dict[str, Any] = {"merge": merge}
    dtype = data.get("out_dtype") or data.get("dtype")
    if dtype is not None:
        if dtype not in _DTYPES:
            raise RequestError(f"dtype is {dtype!r} (expected one of {', '.join(_DTYPES)})")
        found["dtype"] = _DTYPES[dtype]
    return found


def _in_order(
    method: Method, listed: list[tuple[str, dict[str, Any]]], base: str | None
) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """Return the models in our order, and our base. mergekit lists the base among the models, or not."""
    others = [(model, own) for model, own in listed if model != base]
    if method.name in _FROM_BASE:
        if base is None:
            raise RequestError(f"{method.name} needs base_model, which says where it begins")
        mine = next(((model, own) for model, own in listed if model == base), (base, {}))
        return [mine, *others], None
    if method.base == "no":
        return listed, None
    return (others if base is not None else listed), base


def _parameters(method: Method, own: list[dict[str, Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(_DEFAULTS.get(method.name, {}))
    known = {parameter.name: parameter for parameter in method.parameters}
    for key in dict.fromkeys([*shared, *(key for one in own for key in one)]):
        name = _NAMES.get(key, key)
        if key in _IGNORED:
            continue
        if name not in known:
            neutral = key == "rescale" and not shared.get(key) and not any(one.get(key) for one in own)
            if neutral:
                continue
            raise RequestError(f"{method.name} has no parameter {key!r}{nearest(key, known)}")
        values = [one.get(key, shared.get(key)) for one in own]
        if known[name].kind is tuple:
            if any(value is None for value in values):
                default = found.get(name, known[name].default)
                plain = default[0] if isinstance(default, tuple) else default
                values = [plain if value is None else value for value in values]
            found[name] = [_value(value) for value in values]
        elif any(key in one for one in own):
            differing = [one[key] for one in own if key in one]
            if any(value != differing[0] for value in differing):
                raise RequestError(f"{key} of {method.name} is one value for all models, not one for each")
            found[name] = _value(differing[0])
        else:
            found[name] = _value(shared[key])
    return found


def _value(raw: Any) -> Any:
    """Translate a number, a gradient, or a list of filters."""
    if not isinstance(raw, list):
        return raw
    if all(isinstance(one, dict) for one in raw):
        return _filters(raw)
    if not raw or not all(isinstance(one, int | float) for one in raw):
        raise RequestError(f"{raw!r} is no gradient (expected numbers, or filters with values)")
    if len(raw) == 1:
        return raw[0]
    return {"value": raw[0], "blocks": "gradient:" + ",".join(map(str, raw))}


def _filters(raw: list[dict[str, Any]]) -> dict[str, Any]:
    """Translate filters, of which the first that fits counts, into rules, of which the last does."""
    plain = [one.get("value") for one in raw if one.get("filter") in (None, "*")]
    rules = [f"*{one['filter']}*:{one['value']}" for one in raw if one.get("filter") not in (None, "*")]
    if not plain:
        raise RequestError("the filters leave tensors without a value (expected a last entry without filter)")
    return {"value": plain[0], "rules": rules[::-1]}


def _entry(raw: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(raw, str):
        return _path(raw), {}
    one = _mapping(raw, "a model")
    if "model" not in one:
        raise RequestError("a model has no name (expected model: path)")
    for key in one:
        if key not in ("model", "parameters"):
            raise RequestError(f"a model has no key {key!r}{nearest(str(key), ('model', 'parameters'))}")
    return _path(one["model"]), dict(_mapping(one.get("parameters"), "parameters of a model"))


def _path(raw: Any) -> str:
    found = raw.get("path") if isinstance(raw, dict) else raw
    if not isinstance(found, str) or "+" in found:
        raise RequestError(f"{raw!r} is no model file (adapters behind a + are not understood)")
    return found


def _list(raw: Any) -> list[Any]:
    if not isinstance(raw, list) or not raw:
        raise RequestError("models is no list of models")
    return raw


def _mapping(raw: Any, what: str) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RequestError(f"{what} is no mapping (expected name: value)")
    return raw
