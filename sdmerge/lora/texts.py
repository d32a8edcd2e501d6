"""What other programs expect to read in the metadata of an adapter that was not trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge.provenance import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterable

_MODULES = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1", "sd3": "sd3"}


def adapter_texts(family: str | None, ranks: Iterable[int]) -> dict[str, str]:
    """Return sd-scripts' texts and the model specification's.

    Args:
        family: what it is for.
        ranks: of its modules, with alpha the same; 0 for those that are left out.
    """
    used = set(ranks) - {0}
    rank = str(next(iter(used))) if len(used) == 1 else "Dynamic"
    texts = {
        "ss_network_module": _MODULES.get(family or "", "networks.lora"),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }
    if family in _VERSIONS:
        texts |= {"ss_base_model_version": _VERSIONS[family], "ss_v2": str(family == "sd2")}
    if family in ARCHITECTURES:
        texts["modelspec.architecture"] = f"{ARCHITECTURES[family]}/lora"
    return texts
