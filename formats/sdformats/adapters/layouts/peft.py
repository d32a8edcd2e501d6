"""PEFT: a config and weights in a folder, ``base_model.model.M.lora_A.weight``, for one network.

An adapter of several networks is a folder of such folders, named as diffusers names the components.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import AdapterFile, AdapterLayout, Written
from sdformats.adapters.layouts._diffusers import as_vector
from sdformats.adapters.layouts._shared import LORA
from sdformats.adapters.naming import Name, Naming, Prefix
from sdformats.adapters.peft_config import scaled, settings
from sdformats.adapters.reading import named, read_named
from sdformats.adapters.records import InputOFT, LoRA
from sdformats.adapters.roles import KOHYA, LENGTHS, PEFT
from sdformats.errors import CorruptFile
from sdformats.folder import PEFT_CONFIG
from sdformats.rule import one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.adapter import Adapter
    from sdformats.adapters.fused import Fold
    from sdformats.adapters.record import Record
    from sdformats.views import Ref

WEIGHTS = "adapter_model.safetensors"
BASE = "base_model.model."
FOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_CLASSES = {"unet": ("UNet2DConditionModel", "diffusers"), "te1": ("CLIPTextModel", "transformers")}
_CLASSES |= {"te2": ("CLIPTextModelWithProjection", "transformers"), "te3": ("T5EncoderModel", "transformers")}
_UNET: tuple[str, ...] = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_out",
    "time_embedding.",
    "add_embedding.",
)
_UNET += ("conv_norm_out", "norm_out.", "proj_out", "time_text_embed.")
_NETWORK: tuple[str, ...] = (
    *_UNET,
    "transformer_blocks.",
    "single_transformer_blocks.",
    "x_embedder",
    "context_embedder",
    "pos_embed",
)
_ENDS = {key: role for key, role in (PEFT | KOHYA).items() if role not in ("scale", "weight", LENGTHS)}
_MOST_TERMS = 100


class _Naming(Naming):
    """Names without a component, which the module must tell."""

    def understand(self, name: str) -> Name | None:
        folder, found, rest = name.partition(BASE)
        if not found or (folder and folder.rstrip(".") not in FOLDERS.values()):
            return None
        match = self._pattern.fullmatch(rest)
        if match is None:
            return None
        path, end = match.groups()
        given = next((key for key, value in FOLDERS.items() if value == folder.rstrip(".")), None)
        component = given or ("unet" if path.startswith(_NETWORK) else "te3" if ".block." in path else "te1")
        if component in ("te1", "te2") and path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
            path = f"text_model.{path}"
        return Name(folder + BASE + path, self.suffixes[end], component, one(path))

    def module(self, path: str, family: str | None) -> str | None:
        component, _, rest = path.partition(".")
        return BASE + rest if component in FOLDERS else None


def read(layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read by names, and take the scales from the config; without one the scales are not known."""
    adapter = read_named(layout, file)
    if adapter.family is None or adapter.family.startswith("sd"):
        adapter = replace(adapter, modules=_second_encoder(adapter))
    if not file.configs:
        note = f"there is no {PEFT_CONFIG}, which holds the scale: give it with --adapter-config"
        return replace(adapter, scaled=False, notes=(*adapter.notes, note))
    modules: dict[str, Record] = {}
    for path, record in adapter.modules.items():
        component, _, module = path.partition(".")
        config = file.configs.get(FOLDERS[component], file.configs.get(""))
        if config is None:
            return replace(adapter, scaled=False, notes=(*adapter.notes, f"{FOLDERS[component]} has no {PEFT_CONFIG}"))
        where = str(file.source.path.with_name(PEFT_CONFIG))
        modules[path] = scaled(_rotation(record, config, where), module, config, where)
    return replace(adapter, modules=modules)


def _rotation(record: Record, config: Mapping[str, Any], where: str) -> Record:
    """Note which of two formulas a rotation is meant by, and how many terms of the series."""
    if not isinstance(record, InputOFT):
        return record
    if not config.get("use_cayley_neumann", True):
        return replace(record, terms=None)
    terms = config.get("num_cayley_neumann_terms", 5)
    if type(terms) is not int or not 1 <= terms <= _MOST_TERMS:
        expected = f"1 to {_MOST_TERMS}"
        raise CorruptFile(f"says num_cayley_neumann_terms is {str(terms)[:40]!r}", path=where, expected=expected)
    return replace(record, terms=terms)


def _second_encoder(adapter: Adapter) -> dict[str, Record]:
    """Name a lone text encoder as wide as CLIP-G te2."""
    wide = any(
        record.columns == 1280
        for path, record in adapter.modules.items()
        if path.startswith("te1.") and "q_proj" in path
    )
    return {("te2" + path[3:] if wide and path.startswith("te1.") else path): r for path, r in adapter.modules.items()}


def write(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> Written:
    """Write a folder, or one for each component.

    Raises:
        CannotHold: as `peft_config.settings`.
    """
    several = len(adapter.components) > 1
    tensors: dict[str, Ref] = {}
    texts: dict[str, str] = {}
    for component in adapter.components:
        folder = f"{FOLDERS[component]}/" if several else ""
        records: dict[str, LoRA] = {}
        for path, record in adapter.modules.items():
            if not path.startswith(f"{component}."):
                continue
            module = path.partition(".")[2]
            if not isinstance(record, LoRA):
                raise CannotHold(f"is {record.algorithm}", key=path, advice="convert with --as lora")
            plain = replace(record, alpha=None)
            if plain.magnitude is not None:
                plain = replace(plain, magnitude=as_vector(plain))
            for name, ref in named(layout, BASE + module, plain).items():
                tensors[f"{folder}{WEIGHTS}/{name}"] = ref
            records[module] = record
        texts[folder + PEFT_CONFIG] = json.dumps(_config(component, adapter.family, records), indent=2, sort_keys=True)
    return Written(tensors, dict(adapter.metadata), texts)


def _config(component: str, family: str | None, records: dict[str, LoRA]) -> dict[str, Any]:
    name, library = _CLASSES[component]
    if component == "unet" and family in ("flux", "sd3"):
        name = "FluxTransformer2DModel" if family == "flux" else "SD3Transformer2DModel"
    return {
        "auto_mapping": {"base_model_class": name, "parent_library": library},
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
    } | settings(records)


LAYOUT = AdapterLayout(
    name="peft",
    title="PEFT's folder of a config and weights",
    written_by="peft (save_pretrained), training scripts on it",
    read_by="peft, diffusers (load_adapter)",
    holds=LORA | {"dora"},
    alpha="metadata",
    naming=_Naming((Prefix(BASE, "unet", "any", flat=False),), _ENDS),
    marks=(r"(^|\.)base_model\.model\.",),
    read=read,
    write=write,
)
