"""Arithmetic on tensors: each kernel is a torch reference, a Triton version and the cases that hold them together.

The modules are imported when first used, so that a command line can know this package without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from sdkernels import cast as cast
    from sdkernels import kernel as kernel
    from sdkernels import linear as linear

__all__ = ["cast", "kernel", "linear"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
