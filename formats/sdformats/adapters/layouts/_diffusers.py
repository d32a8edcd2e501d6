"""Reading and writing of diffusers' LoRA files: scales in a JSON text of the metadata, or 1."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdformats.adapters.layout import AdapterFile, AdapterLayout, Written
from sdformats.adapters.peft_config import scaled, settings
from sdformats.adapters.reading import fused_modules, named, read_named
from sdformats.adapters.records import LoRA
from sdformats.adapters.roles import disassemble
from sdformats.errors import CorruptFile

if TYPE_CHECKING:
    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.fused import Fold
    from sdformats.adapters.record import Record
    from sdformats.views import Ref

KEY = "lora_adapter_metadata"
_TEXT_MODEL = "text_model."


def read(layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read by names, and take the scales from the metadata where they are.

    Raises:
        CorruptFile: the metadata are no JSON object, or do not fit the tensors.
    """
    adapter = read_named(layout, file)
    text = file.source.metadata.get(KEY)
    if text is None:
        return adapter
    where = str(file.source.path)
    try:
        all_settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"has {KEY} that is no JSON", path=where) from error
    if not isinstance(all_settings, dict):
        raise CorruptFile(f"has {KEY} that is no object", path=where)
    modules = {path: _scaled(layout, path, record, all_settings, where) for path, record in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _scaled(layout: AdapterLayout, path: str, record: Record, all_settings: dict[str, Any], where: str) -> Record:
    assert layout.naming is not None, "these layouts have names"
    spelled = layout.naming.module(path, None) or ""
    for prefix in layout.naming.prefixes:
        config = {
            key.removeprefix(prefix.text): value for key, value in all_settings.items() if key.startswith(prefix.text)
        }
        if spelled.startswith(prefix.text) and config:
            module = spelled.removeprefix(prefix.text)
            bare = module.removeprefix(_TEXT_MODEL)
            patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
            # transformers 5 leaves text_model. out of the names that the settings are for.
            dialect = any(isinstance(pattern, dict) and bare in pattern for pattern in patterns)
            return scaled(record, bare if dialect else module, config, where)
    return record


def write(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> Written:
    """Write names, and the scales into the metadata where any is not 1.

    Raises:
        CannotHold: as `reading.write_named`.
    """
    tensors: dict[str, Ref] = {}
    by_prefix: dict[str, dict[str, LoRA]] = {}
    assert layout.naming is not None, "these layouts have names"
    for module, record in fused_modules(layout, adapter, fold).items():
        plain = replace(record, alpha=None)
        if plain.magnitude is not None and "dora_scale" in disassemble(plain):
            plain = replace(plain, magnitude=as_vector(plain))
        tensors |= named(layout, module, plain)
        prefix = next(prefix.text for prefix in layout.naming.prefixes if module.startswith(prefix.text))
        if isinstance(record, LoRA):
            # diffusers looks text encoders' modules up without text_model., as transformers 5 names them.
            by_prefix.setdefault(prefix, {})[module.removeprefix(prefix).removeprefix(_TEXT_MODEL)] = record
    metadata = dict(adapter.metadata)
    if any(record.scale != 1 for records in by_prefix.values() for record in records.values()):
        told = {
            prefix + key: value for prefix, records in by_prefix.items() for key, value in settings(records).items()
        }
        metadata[KEY] = json.dumps(told, sort_keys=True)
    return Written(tensors, metadata)


def as_vector(record: Record) -> Any:
    """Return DoRA's lengths in the shape that PEFT has: (out,), or (1, out, 1, 1) for a convolution."""
    from sdformats.views import reshaped

    assert record.magnitude is not None, "asked for DoRA only"
    values = record.magnitude.values
    axes = len(record.down.shape) if isinstance(record, LoRA) else 2
    size = values.spec.numel
    shape = (size,) if axes == 2 else (1, size, *(1,) * (axes - 2))
    return replace(record.magnitude, values=reshaped(values, shape))
