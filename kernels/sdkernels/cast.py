"""Every change of element type: widening to the arithmetic type, and the one rounding at the end.

All roundings are to nearest, ties to even. What is too large for the output type is found first (`overflow`), so that the
caller decides; a conversion never decides in silence.
"""

from functools import cache

import torch
from torch import Tensor

_HAS_INFINITY = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type to compute in: float64 where an input has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@cache
def limit(dtype: torch.dtype) -> float:
    """Return the largest magnitude that still rounds to a finite value of `dtype`, as float64.

    A value up to half a step above the largest finite one rounds down to it; the tie itself goes to the even neighbour,
    which is the overflow for the IEEE types (odd last mantissa) and the largest value for float8_e4m3fn (even one).
    """
    top = torch.finfo(dtype).max
    if dtype == torch.float64:
        return top
    if dtype == torch.float8_e4m3fn:
        return top + 16.0
    mantissa_bits = round(-torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64).log2().item())
    exponent = torch.frexp(torch.tensor(top, dtype=torch.float64))[1].item() - 1
    tie = top + 2.0 ** (exponent - mantissa_bits - 1)
    return float(torch.nextafter(torch.tensor(tie, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item())


def overflow(x: Tensor, dtype: torch.dtype) -> int:
    """Count the finite elements of `x` that `dtype` cannot hold."""
    magnitude = x.abs().double()
    return int(((magnitude > limit(dtype)) & magnitude.isfinite()).sum().item())


def narrow(x: Tensor, out: Tensor, *, saturate: bool = False) -> Tensor:
    """Round `x` (float32 or float64) once into `out` and return it.

    Args:
        x: any shape.
        out: same shape, any floating type.
        saturate: clamp what does not fit to the largest finite value instead of infinity (NaN in float8_e4m3fn,
            which has no infinity).
    """
    if saturate:
        top = torch.finfo(out.dtype).max
        x = x.clamp(-top, top)
    elif out.dtype not in _HAS_INFINITY:
        x = torch.where(x.abs() > limit(out.dtype), torch.nan, x)
    if x.dtype == torch.float64 and out.dtype not in (torch.float32, torch.float64):
        x = _to_odd_float32(x)
    return out.copy_(x)


def _to_odd_float32(x: Tensor) -> Tensor:
    """Round float64 to float32 so that rounding again, to a narrower type, is as good as one rounding.

    Round to odd (Boldo & Melquiond 2008): where float32 is not exact, take the neighbour with an odd last bit.
    """
    near = x.float()
    bits = near.view(torch.int32)
    inexact = (near.double() != x) & near.isfinite()
    even = (bits & 1) == 0
    step = torch.where((near.double() < x) == (bits >= 0), 1, -1).to(torch.int32)
    return torch.where(inexact & even, bits + step, bits).view(torch.float32)
