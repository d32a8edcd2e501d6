"""Stochastic rounding: up or down with the probability of the nearness, so that the expected value is exact.

Between its neighbours in the narrower type a value lies at q = |x| / step; the upper neighbour is taken where a uniform
number of 24 bits is below q's fraction. A value that the type holds is never changed.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels.cast import limit, narrow
from sdkernels.flat import deliver, span, target
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.philox import Key, Stream, key, seed_of, words_of

_COUNTERS = 256


def _form(dtype: torch.dtype) -> tuple[int, int]:
    """Return a type's bits of mantissa and the exponent of its smallest normal number."""
    info = torch.finfo(dtype)
    return 1 - math.frexp(info.eps)[1], math.frexp(info.smallest_normal)[1] - 1


def _holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    return dtype in (stored, torch.float64) or (dtype == torch.float32 and stored != torch.float64)


def reference(x: Tensor, out: Tensor, key: Key, start: int = 0) -> Tensor:
    """Round each value of `x` to one of its two neighbours in out's type, the nearer one with the higher probability.

    Above the largest finite value there is no upper neighbour: what rounds to nearest stays finite becomes the largest
    value, and what doesn't is infinity, or NaN in float8_e4m3fn, as in `cast.narrow`. NaN stays NaN.

    Args:
        x: any shape, any floating type.
        out: of x's shape, any floating type; not x itself.
        key: which random numbers, from `philox.key`.
        start: the index of x's first element among them: for a block of a tensor, where the block begins.

    Returns:
        `out`.
    """
    if _holds(out.dtype, x.dtype):
        return out.copy_(x)
    values, rounded = x.reshape(-1), target(x, out.dtype, out)
    size = span(x)
    stream = Stream(key, min(size, max(1, values.numel())))
    for lo in range(0, values.numel(), size):
        part = values[lo : lo + size].double()
        words = stream.take(start + lo, part.numel())
        uniform = torch.from_numpy((words >> 8).view("int32")).to(x.device) * 2.0**-24
        narrow(_round(part, uniform, out.dtype).float(), rounded[lo : lo + size])  # float32 holds it too
    return deliver(rounded, x, out)


def _round(x: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values that `dtype` holds; infinity for those beyond its limit."""
    bits, lowest = _form(dtype)
    exponent = (x.view(torch.int64) >> 52) & 0x7FF
    step = ((exponent.clamp_(min=lowest + 1023) - bits) << 52).view(torch.float64)
    magnitude = x.abs()
    steps = magnitude / step
    whole = steps.floor()
    up = uniform < steps.sub_(whole)
    near = whole.add_(up.double()).mul_(step).clamp_(max=torch.finfo(dtype).max).copysign_(x)
    within = magnitude <= limit(dtype)
    return near if bool(within.all()) else torch.where(within, near, x * torch.inf)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def by_chance(value, words, largest, last, tiny, per_step, step, CUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of float32 values, rounded as `Form` says.

    Fraction and floor of a number of steps are the lower and upper bits of a float32 that is normal in the narrow type.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    fraction = magnitude & ((1 << CUT) - 1)
    up = (words >> (32 - CUT)).to(tl.int32) < fraction
    rounded = magnitude - fraction + tl.where(up, 1 << CUT, 0)
    steps = magnitude.to(tl.float32, bitcast=True) * per_step
    whole = tl.floor(steps)
    up = (words >> 8).to(tl.int32).to(tl.float32) < (steps - whole) * 16777216.0
    small = (whole + tl.where(up, 1.0, 0.0)) * step
    rounded = tl.where(magnitude < tiny, small.to(tl.int32, bitcast=True), rounded)
    beyond = tl.where(magnitude > 0x7F800000, magnitude | 0x00400000, 0x7F800000)
    return tl.where(magnitude > last, beyond, tl.minimum(rounded, largest)) | (bits ^ magnitude)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_bits(place, bits, mask, HALVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what `by_chance` returned."""
    if HALVED:
        tl.store(place, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(place, bits.to(tl.float32, bitcast=True).to(place.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "first"])  # type: ignore[untyped-decorator, unused-ignore]
def _round_kernel(  # type: ignore[no-untyped-def]
    out, x, seed, first, count, largest, last, tiny, per_step, step,
    CUT: tl.constexpr, HALVED: tl.constexpr, SKIPPED: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS) - SKIPPED
    inside = (at >= 0) & (at < count)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    bits = by_chance(value, words_of(seed, first, COUNTERS), largest, last, tiny, per_step, step, CUT)
    store_bits(out + at, bits, inside, HALVED)


class Form(NamedTuple):
    """How a kernel rounds to a type by chance.

    Attributes:
        numbers: bits of the largest value, of the last that is not beyond it, of the smallest normal one; steps below that
            in 1, and the inverse.
        cut: bits of float32's mantissa that go.
        halved: whether the result is float32's upper half, stored as int16.
    """

    numbers: tuple[int, int, int, float, float]
    cut: int
    halved: bool


def form_of(dtype: torch.dtype) -> Form:
    """Return how to round to a type.

    bfloat16 is float32's upper half: its subnormal numbers are cut like the others, and it is stored as bits, since Triton's
    interpreter narrows subnormal numbers to it wrongly.
    """
    mantissa, lowest = _form(dtype)
    halved = dtype == torch.bfloat16
    scale = 1.0 if halved else 2.0 ** (mantissa - lowest)
    tiny = 0 if halved else _bits(2.0**lowest)
    numbers = (_bits(torch.finfo(dtype).max), _bits(limit(dtype)), tiny, scale, 1 / scale)
    return Form(numbers, 23 - mantissa, halved)


def fast(x: Tensor, out: Tensor, key: Key, start: int = 0) -> Tensor:
    """Do what `reference` does. fp8 is narrowed by torch after the launch, which gives it values that it holds."""
    if x.dtype == torch.float64 or _holds(out.dtype, x.dtype):
        return reference(x, out, key, start)
    values = (x.float() if x.dtype.itemsize == 1 else x).contiguous()
    direct = out.is_contiguous() and out.dtype.itemsize == 2
    result = out if direct else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    first, skipped = divmod(start, 4)
    if x.numel():
        form = form_of(out.dtype)
        halved = direct and form.halved
        _round_kernel[(triton.cdiv(x.numel() + skipped, 4 * _COUNTERS),)](
            result.view(torch.int16) if halved else result, values, seed_of(key), first, x.numel(), *form.numbers,
            CUT=form.cut, HALVED=halved, SKIPPED=skipped, COUNTERS=_COUNTERS,
        )  # fmt: skip
    return out if direct else narrow(result, out)


def _bits(value: float) -> int:
    """Return the bits of the largest float32 that is no larger than a positive value."""
    near = torch.tensor(value, dtype=torch.float32)
    return int(near.view(torch.int32).item()) - (near.item() > value)


def cases() -> Iterable[Case]:
    """Every type in and out, starts inside a counter; small, subnormal, huge and non-finite values."""
    types = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        for dtype in types:
            for count, start in ((1, 0), (2050, 4), (1021, 7)):
                name = f"{stored}-{dtype}-{count}-from-{start}".replace("torch.", "")
                yield Case(
                    name, partial(_make, stored, dtype, count, start), count * (stored.itemsize + dtype.itemsize)
                )


def _make(stored: torch.dtype, dtype: torch.dtype, count: int, start: int, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(count)
    scale = torch.empty(count).uniform_(-30, 25, generator=source).exp2_()
    x = torch.randn(count, generator=source) * scale
    info = torch.finfo(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max * 1.001, info.max * 1.2, 3.4e38, 1e-45]
    special += [info.smallest_normal, info.smallest_normal * 0.7, -info.smallest_normal * info.eps * 0.5]
    x[: len(special)] = torch.tensor(special[:count])
    return x.to(stored).to(device), torch.empty(count, dtype=dtype, device=device), key(count, "weight"), start


def large(moved: int) -> Case:
    """float32 in, bfloat16 out."""
    return Case("fp32-bf16", partial(_make_large, moved // 6), moved // 6 * 6)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    return torch.randn(count, device=device), torch.empty(count, dtype=torch.bfloat16, device=device), key(0, "large")


def plain(x: Tensor, out: Tensor, _key: Key) -> Tensor:
    """Compute the same from torch's own random numbers, for bfloat16 and finite values."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return out.copy_(((x.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32))


stochastic = Kernel("rounding.stochastic", reference, fast, cases, large, plain)
