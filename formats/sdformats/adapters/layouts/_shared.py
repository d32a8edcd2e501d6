"""What several layouts have in common: beginnings of names, ends of names, sets of algorithms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.adapters.naming import Prefix
from sdformats.adapters.reading import write_named
from sdformats.adapters.records import Rows

if TYPE_CHECKING:
    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.fused import Fold
    from sdformats.adapters.layout import AdapterLayout, Written

UNET_FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
LORA = frozenset({"lora", "locon"})
LYCORIS_ENDS = (
    r"\.(hada_\w+|lokr_\w+|on_input|[ab][12]\.weight|oft_\w+|[wb]_norm|diff|diff_b|dora_scale|lora_mid\.weight)$"
)
"""Ends of names that LyCORIS writes and sd-scripts does not read."""

KOHYA_TEXT_ENCODERS = (
    Prefix("lora_te_", "te1", "clip", families=("sd1", "sd2")),
    Prefix("lora_te1_", "te1", "clip"),
    Prefix("lora_te2_", "te2", "clip"),
    Prefix("lora_te3_", "te3", "t5"),
    Prefix("lora_te_", "te1", "clip", reads_only=True),
    Prefix("lora_te2_", "te3", "t5", reads_only=True),
)
"""sd-scripts' text encoders; some write T5 as the second."""
DIFFUSERS_TEXT_ENCODERS = (
    Prefix("text_encoder.", "te1", "any", flat=False),
    Prefix("text_encoder_2.", "te3", "t5", flat=False, families=("flux",)),
    Prefix("text_encoder_2.", "te2", "any", flat=False),
    Prefix("text_encoder_3.", "te3", "any", flat=False),
)


def write_with_alpha(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> Written:
    """Write by names, with an alpha for every rank: LyCORIS does not load factors without one.

    Raises:
        CannotHold: as `reading.write_named`.
    """
    modules = {
        path: record
        if record.alpha is not None or record.rank is None or isinstance(record, Rows)
        else replace(record, alpha=float(record.rank))
        for path, record in adapter.modules.items()
    }
    return write_named(layout, replace(adapter, modules=modules), fold)
