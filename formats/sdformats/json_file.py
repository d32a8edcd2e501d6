"""Small JSON files beside models: configurations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile, FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LARGEST = 1 << 20


def read_object(path: Path) -> Mapping[str, Any]:
    """Return the object that a file holds.

    Raises:
        FormatError: it cannot be read.
        CorruptFile: it is no JSON object, or too large for a configuration.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise CorruptFile("is too large for a config", path=path)
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile("is no JSON", path=path) from error
    if not isinstance(found, dict):
        raise CorruptFile("is no JSON object", path=path)
    return found
