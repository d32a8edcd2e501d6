"""Custom Diffusion's deltas, taken for adapters: weights that replace the model's, or LoRA where they are compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.layout import AdapterFile, AdapterLayout
from sdformats.adapters.records import Full, LoRA
from sdformats.custom_diffusion.delta import Product, read_custom_diffusion
from sdformats.custom_diffusion.kind import BESIDE, DIFFUSERS, KIND, MODULE, family_of
from sdformats.kind import Looks
from sdformats.views import Ref, rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.record import Record
    from sdformats.custom_diffusion.delta import CustomDiffusion
    from sdformats.tensor import Spec

_VOCABULARY = 49408
"""Tokens of CLIP; a text encoder that was trained with new words has more rows."""
_ENCODERS = ("clip_l", "clip_g")


def read(_layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read a delta in any of its forms."""
    record = read_custom_diffusion(file.source)
    return Adapter(
        modules=_modules(record),
        embeddings=_embeddings(record),
        metadata=record.extras,
        family=family_of(file.source.specs),
        notes=record.notes,
    )


def _modules(record: CustomDiffusion) -> dict[str, Record]:
    modules: dict[str, Record] = {}
    parts: dict[str, dict[str, Ref]] = {}
    for name, weight in record.weights.items():
        module, _, end = name.rpartition(".")
        if isinstance(weight, Product):
            modules[f"unet.{module}"] = LoRA(up=weight.up, down=weight.down, alpha=float(weight.rank))
        else:
            parts.setdefault(f"unet.{module}", {})[end] = weight
    for name, weight in record.text_encoder.items():
        module, _, end = name.rpartition(".")
        if end in ("weight", "bias"):
            module = module if module.startswith("text_model.") else f"text_model.{module}"
            grown = module.endswith("token_embedding") and weight.shape[0] > _VOCABULARY
            parts.setdefault(f"te1.{module}", {})[end] = rows(weight, 0, _VOCABULARY) if grown else weight
    for path, ends in parts.items():
        modules[path] = Full(weight=ends.get("weight"), bias=ends.get("bias"), replaces=True, new_bias=True)
    return modules


def _embeddings(record: CustomDiffusion) -> dict[str, dict[str, Ref]]:
    found = {}
    for word, vectors in record.words.items():
        keys = _ENCODERS if len(vectors) > 1 else ("*",)
        found[word] = dict(zip(keys, vectors, strict=False))
    return found


def _is_delta(specs: Mapping[str, Spec]) -> bool:
    """Whether there is nothing else in the file: a model has such weights too."""
    return KIND.read(Looks(specs, {})) is not None


_WEIGHTS = rf"(^|\.){MODULE}(\.[uv])?$"

LAYOUT = AdapterLayout(
    name="custom-diffusion",
    title="Custom Diffusion's deltas, taken for adapters",
    written_by="Custom Diffusion, diffusers' trainer, sdmerge",
    read_by="Custom Diffusion, diffusers",
    holds=frozenset({"full", "lora", "replaced weights", "embeddings"}),
    alpha="none",
    needs=(rf"{_WEIGHTS}|{DIFFUSERS}",),
    bars=(r"lora|hada_|lokr_|oft_|dora_scale|\.___\.",),
    marks=(_WEIGHTS, DIFFUSERS, *BESIDE),
    families=("sd1", "sd2", "sdxl"),
    read=read,
    fits=_is_delta,
)
