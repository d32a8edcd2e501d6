"""Read, convert, merge, bake, extract and train Stable Diffusion model files.

::

    import sdmerge
    sdmerge.add_difference("a.safetensors", "b.ckpt", "c.safetensors", alpha=1.0, output="d.safetensors")

Names are loaded when first used, so importing this package costs nothing; torch is loaded when something is computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdmerge.adapters import bake as bake
    from sdmerge.adapters import extract_lora as extract_lora
    from sdmerge.adapters import merge_lora as merge_lora
    from sdmerge.adapters import resize_lora as resize_lora
    from sdmerge.api import Report as Report
    from sdmerge.api import add_difference as add_difference
    from sdmerge.api import convert as convert
    from sdmerge.api import join as join
    from sdmerge.api import merge as merge
    from sdmerge.api import run_recipe as run_recipe
    from sdmerge.api import split as split
    from sdmerge.api import sweep as sweep
    from sdmerge.api import weighted_sum as weighted_sum
    from sdmerge.blocks import Weights as Weights
    from sdmerge.comparison import Difference as Difference
    from sdmerge.comparison import diff as diff
    from sdmerge.custom_diffusion import compress_custom as compress_custom
    from sdmerge.custom_diffusion import merge_custom as merge_custom
    from sdmerge.embeddings import bundle_embeddings as bundle_embeddings
    from sdmerge.embeddings import extract_embeddings as extract_embeddings
    from sdmerge.embeddings import mix_embeddings as mix_embeddings
    from sdmerge.embeddings import slice_embedding as slice_embedding
    from sdmerge.embeddings import stack_embeddings as stack_embeddings
    from sdmerge.errors import SdmergeError as SdmergeError
    from sdmerge.inspection import inspect_path as inspect_path
    from sdmerge.options import Options as Options
    from sdmerge.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "Report": "sdmerge.api",
    "add_difference": "sdmerge.api",
    "bake": "sdmerge.adapters",
    "compress_custom": "sdmerge.custom_diffusion",
    "convert": "sdmerge.api",
    "extract_lora": "sdmerge.adapters",
    "join": "sdmerge.api",
    "merge": "sdmerge.api",
    "merge_custom": "sdmerge.custom_diffusion",
    "merge_lora": "sdmerge.adapters",
    "resize_lora": "sdmerge.adapters",
    "run_recipe": "sdmerge.api",
    "split": "sdmerge.api",
    "sweep": "sdmerge.api",
    "weighted_sum": "sdmerge.api",
    "Weights": "sdmerge.blocks",
    "Difference": "sdmerge.comparison",
    "diff": "sdmerge.comparison",
    "bundle_embeddings": "sdmerge.embeddings",
    "extract_embeddings": "sdmerge.embeddings",
    "mix_embeddings": "sdmerge.embeddings",
    "slice_embedding": "sdmerge.embeddings",
    "stack_embeddings": "sdmerge.embeddings",
    "SdmergeError": "sdmerge.errors",
    "inspect_path": "sdmerge.inspection",
    "Options": "sdmerge.options",
    "verify": "sdmerge.verification",
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - the names above, once


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdmerge' has no attribute {name!r}")
