"""Adapters: LoRA and its relatives, in every layout that people meet.

`open_adapter` reads one; `AdapterLayout.write` (of a layout from `layouts`) makes the tensors of another layout from it.
To add a layout, write a file in ``layouts``: an `AdapterLayout` called ``LAYOUT``, which says what its names look like (a
`Naming` of prefixes and suffixes over the tables in `names`), by what it is recognised, and what it can hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdformats.adapters.layout import AdapterFile, detect_adapter
from sdformats.errors import FormatError
from sdformats.folder import PEFT_CONFIG
from sdformats.json_file import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.layout import AdapterLayout
    from sdformats.tensor import TensorSource


def open_adapter(source: TensorSource, config: Path | None = None) -> tuple[Adapter, AdapterLayout]:
    """Read the adapter in an open file, but for its weights.

    Args:
        source: the file; it must stay open as long as the adapter's tensors are read.
        config: PEFT's settings, where they are not beside the file.

    Raises:
        FormatError: it is in no known layout, or broken.
    """
    try:
        layout = detect_adapter(source.specs)
        adapter = layout.read(layout, AdapterFile(source, _configs(source, config)))
    except FormatError as error:
        error.path = error.path or source.path
        raise
    return replace(adapter, notes=(*adapter.notes, *source.notes)), layout


def _configs(source: TensorSource, given: Path | None) -> Mapping[str, Mapping[str, Any]]:
    """Return PEFT's settings by component; "" for a file of one."""
    if given is not None:
        return {"": read_object(given)}
    if not any("base_model.model." in name for name in source.specs):
        return {}
    folder = source.path if source.path.is_dir() else source.path.parent
    if (folder / PEFT_CONFIG).is_file():
        return {"": read_object(folder / PEFT_CONFIG)}
    prefixes = {name.partition(".base_model.")[0] for name in source.specs}
    return {
        name: read_object(folder / name / PEFT_CONFIG)
        for name in sorted(prefixes)
        if (folder / name / PEFT_CONFIG).is_file()
    }
