"""Configs that a model came with: read from a folder, and carried by a single file in its metadata.

Names of people's folders are left out (``_name_or_path``), as is what would make a library load code.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sdformats.configs import Config

KEY = "sdmerge.configs"
"""Under which a single file's metadata carries them."""
_LARGEST = 1 << 20
_LEFT_OUT = ("auto_map", "quantization_config")


def of_folder(folder: Path, components: Iterable[str]) -> dict[str, Config]:
    """Return the configs of a folder's components and of its scheduler, where there are any.

    Raises:
        CorruptFile: one cannot be read as JSON.
    """
    files = {name: folder / name / "config.json" for name in components}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {name: _read(file) for name, file in files.items() if file.is_file()}


def of_metadata(metadata: Mapping[str, str]) -> dict[str, Config]:
    """Return the configs that a single file carries; what is no such thing is passed over."""
    try:
        found = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: _clean(config) for name, config in found.items() if isinstance(config, dict)}


def as_metadata(configs: Mapping[str, Config]) -> dict[str, str]:
    """Return the metadata that carries configs."""
    return {KEY: json.dumps(configs, separators=(",", ":"), sort_keys=True)} if configs else {}


def _read(file: Path) -> Config:
    if file.stat().st_size > _LARGEST:
        raise CorruptFile("is too large for a config", path=file, expected=f"at most {_LARGEST:,} bytes")
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"is no JSON: {error}", path=file) from error
    if not isinstance(found, dict):
        raise CorruptFile("is no config", path=file, expected="a JSON object")
    return _clean(found)


def _clean(config: Config) -> Config:
    return {
        name: value
        for name, value in config.items()
        if name == "_class_name" or not (name.startswith("_") or name in _LEFT_OUT)
    }
