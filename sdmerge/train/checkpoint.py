"""States of a run, to go on from: weights, optimizer, average and step, as one safetensors file each.

Random numbers need no place in it: they follow from the seed and the step (see `batches`). A state appears whole or not at all,
and an older one is removed only when a newer one is there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdformats.errors import CorruptFile, FormatError
from sdformats.files import open_source
from sdformats.safetensors import SafetensorsSink
from sdformats.tensor import Spec
from sdmerge.dtypes import TORCH
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_NAME = re.compile(r"state-(\d+)\.safetensors")
_TYPES = {dtype: ours for ours, dtype in TORCH.items()}
_MARK = "$tensor"
_KEY = "sdmerge.state"


@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes:
        step: steps done.
        identity: what must be the same for the run to go on from it, as JSON can say it.
        parts: tensors and plain values, nested in dicts and lists.
    """

    step: int
    identity: Mapping[str, Any]
    parts: Mapping[str, Any]


def save(folder: Path, state: State, keep: int) -> Path:
    """Write a state, and remove all but the newest `keep`.

    Raises:
        sdformats.errors.WriteError: it cannot be written; older states are as they were.
    """
    tensors: dict[str, Tensor] = {}
    told = {"step": state.step, "identity": state.identity, "parts": _flattened(state.parts, "", tensors)}
    path = folder / f"state-{state.step:08d}.safetensors"
    specs = {name: Spec(tuple(value.shape), _TYPES[value.dtype]) for name, value in tensors.items()}
    with SafetensorsSink(path, specs, {_KEY: json.dumps(told)}, overwrite=True) as sink:
        for name, value in tensors.items():
            if value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1)
                sink.write(name, 0, flat.view(torch.uint8).numpy().data)
    for old in states(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def states(folder: Path) -> list[Path]:
    """Return the states in a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("state-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load(path: Path) -> State:
    """Read a state.

    Raises:
        sdformats.errors.FormatError: it is none, or broken.
    """
    with open_source(path) as source:
        try:
            told = json.loads(source.metadata[_KEY])
            tensors = {
                name: torch.frombuffer(source.read(name), dtype=torch.uint8).view(TORCH[spec.dtype]).reshape(spec.shape)
                if spec.numel
                else torch.empty(spec.shape, dtype=TORCH[spec.dtype])
                for name, spec in source.specs.items()
            }
            return State(told["step"], told["identity"], _nested(told["parts"], tensors))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise CorruptFile("is no state of a training run", path=path) from error


def newest(folder: Path, identity: Mapping[str, Any]) -> State | None:
    """Return the newest state that can be read; None where there is none.

    Raises:
        RequestError: it is of a run with other settings or other data.
    """
    for path in reversed(states(folder)):
        try:
            state = load(path)
        except FormatError:
            continue
        for name, value in json.loads(json.dumps(identity)).items():
            before = state.identity.get(name)
            if before != value:
                raise RequestError(
                    f"{path}: is of a run with {name} {_shown(before)}, not {_shown(value)} (expected the same settings and "
                    "data to go on; --overwrite begins again)"
                )
        return state
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flattened(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested values as JSON can hold them, with the names of their tensors in the tensors' places."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {_MARK: path}
    if isinstance(value, dict):
        # JSON's keys are texts; optimizers count parameters by number
        return {"$items": [[key, _flattened(inner, f"{path}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [_flattened(inner, f"{path}/{i}", tensors) for i, inner in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved")


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(inner, tensors) for inner in value]
    if isinstance(value, dict):
        if _MARK in value:
            return tensors[value[_MARK]]
        return {key: _nested(inner, tensors) for key, inner in value["$items"]}
    return value
