"""What other programs expect in the metadata of an adapter that was not trained: sd-scripts', and the model specification.

No dates and no folders: the same request gives the same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdformats.adapters.records import LoRA, Norm
from sdmerge.provenance import ARCHITECTURES, resolution

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdformats.adapters.layout import AdapterLayout
    from sdformats.adapters.record import Record

_MODULES = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1", "sd3": "sd3"}
_IMPLEMENTATIONS = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sdxl-refiner": "https://github.com/Stability-AI/generative-models",
    "flux": "https://github.com/black-forest-labs/flux",
}


def model_texts(family: str | None, title: str, prediction: str | None = None) -> dict[str, str]:
    """Return what is said about the model that an adapter is for.

    Args:
        family: of the model; what is not known is not said.
        title: of the adapter.
        prediction: ``epsilon`` or ``v``.
    """
    texts: dict[str, str] = {}
    if family in _VERSIONS:
        texts |= {"ss_base_model_version": _VERSIONS[family], "ss_v2": str(family == "sd2")}
    if family in ARCHITECTURES:
        texts |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{ARCHITECTURES[family]}/lora",
            "modelspec.implementation": _IMPLEMENTATIONS.get(family, "diffusers"),
            "modelspec.title": title,
            "modelspec.resolution": resolution(family),
        }
        if prediction is not None:
            texts["modelspec.prediction_type"] = prediction
    return texts


def network_texts(family: str | None, layout: AdapterLayout, modules: Mapping[str, Record]) -> dict[str, str]:
    """Return sd-scripts' texts about an adapter's factors; none where it has no LoRA.

    Ranks and alphas that differ are ``Dynamic``. Convolutions wider than a pixel have their own, in the arguments.
    """
    loras = [record for record in modules.values() if isinstance(record, LoRA)]
    if not loras:
        return {}
    wide = [record for record in loras if _is_wide(record)]
    plain = [record for record in loras if not _is_wide(record)] or wide
    arguments: dict[str, str] = {}
    if layout.name == "lycoris":
        arguments["algo"] = "locon"
    if wide:
        arguments |= {"conv_dim": _common(one.rank for one in wide), "conv_alpha": _common(map(_alpha, wide))}
    if any(record.mid is not None for record in wide):
        arguments["use_tucker"] = "True"
    if any(isinstance(record, Norm) for record in modules.values()):
        arguments["train_norm"] = "True"
    return {
        "ss_network_module": "lycoris.kohya"
        if layout.name == "lycoris"
        else _MODULES.get(family or "", "networks.lora"),
        "ss_network_dim": _common(one.rank for one in plain),
        "ss_network_alpha": _common(map(_alpha, plain)),
        "ss_network_args": json.dumps(arguments),
    }


def _is_wide(record: LoRA) -> bool:
    return record.mid is not None or any(size > 1 for size in record.down.shape[2:])


def _alpha(record: LoRA) -> float:
    return record.scale * record.rank


def _common(values: Iterable[float]) -> str:
    found = set(values)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"
