"""Stability's Control-LoRA: factors for the encoder half of the UNet, which becomes a ControlNet, and whole weights of its own.

It changes no model: its modules are those of a network of its own, the component ``controlnet``, so no other layout holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.layout import AdapterFile, AdapterLayout
from sdformats.adapters.records import Full, LoRA
from sdformats.adapters.shapes import checked
from sdformats.errors import CorruptFile
from sdformats.views import Ref, Stored

if TYPE_CHECKING:
    from sdformats.adapters.record import Record

_MARK = "lora_controlnet"
_FACTORS = (".up", ".down")


def read(_layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read factors as LoRA at scale 1, and everything else as weights that replace what is there.

    Raises:
        CorruptFile: a factor is alone.
    """
    where = str(file.source.path)
    grouped: dict[str, dict[str, Ref]] = {}
    for key in file.source.specs:
        if key != _MARK:
            module, _, end = key.rpartition(".")
            grouped.setdefault(module, {})[end] = Stored(file.source, key)
    modules: dict[str, Record] = {}
    for module, tensors in grouped.items():
        if "up" in tensors or "down" in tensors:
            if not {"up", "down"} <= set(tensors):
                raise CorruptFile("has one factor alone", path=where, key=module)
            record: Record = LoRA(up=tensors.pop("up"), down=tensors.pop("down"))
        else:
            record = Full(weight=tensors.pop("weight", None), replaces=True)
        record = checked(module, replace(record, bias=tensors.pop("bias", None)))
        if tensors:
            raise CorruptFile(f"has {next(iter(tensors))}", path=where, key=module, expected="up, down, weight, bias")
        modules[f"controlnet.{module}"] = record
    note = "a Control-LoRA makes a ControlNet of a model's encoder; it is no change to the model itself"
    family = "sdxl" if any(".transformer_blocks.1." in module for module in grouped) else None
    return Adapter(modules, metadata=dict(file.source.metadata), family=family, notes=(note,))


LAYOUT = AdapterLayout(
    name="control-lora",
    title="Stability's Control-LoRA",
    written_by="Stability AI",
    read_by="ComfyUI, Forge",
    holds=frozenset({"lora", "locon", "full", "bias"}),
    alpha="none",
    needs=(rf"^{_MARK}$",),
    marks=(r".",),
    read=read,
)
