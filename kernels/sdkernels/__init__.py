"""Arithmetic on tensors: each kernel is a torch reference, a Triton version and the cases that hold them together.

The modules are imported when first used, so that a command line can know this package without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from sdkernels import cast as cast
    from sdkernels import dora as dora
    from sdkernels import dropout as dropout
    from sdkernels import hadamard as hadamard
    from sdkernels import kernel as kernel
    from sdkernels import kron as kron
    from sdkernels import lerp as lerp
    from sdkernels import linear as linear
    from sdkernels import lora_linear as lora_linear
    from sdkernels import lowrank as lowrank
    from sdkernels import philox as philox
    from sdkernels import reduce as reduce
    from sdkernels import rounding as rounding
    from sdkernels import select as select
    from sdkernels import ties as ties

__all__ = [
    "cast",
    "dora",
    "dropout",
    "hadamard",
    "kernel",
    "kron",
    "lerp",
    "linear",
    "lora_linear",
    "lowrank",
    "philox",
    "reduce",
    "rounding",
    "select",
    "ties",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
