"""Products of tiles with a float32 sum, for the kernels that multiply matrices."""

import os

import torch

from sdkernels.kernel import tl, triton


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def dot(a, b, total, WIDENED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return total + a b. Tiles of 16 bits are multiplied exactly; float32 ones in float32, never in TF32."""
    if WIDENED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def widened(dtype: torch.dtype) -> bool:
    """Whether tiles must be widened first: Triton's interpreter takes the bits of bfloat16 for whole numbers."""
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
