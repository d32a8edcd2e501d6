"""Random dropout of a delta: DARE's, with one probability for all elements, and DELLA's, with one for each.

Sources: Yu et al., "Language Models are Super Mario" (2023); Deep et al., "DELLA-Merging" (2024).
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdkernels.cast import accumulator
from sdkernels.flat import deliver, span, target
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.philox import Key, Stream, key, seed_of, uniform_of, words_of

_COUNTERS = 256


def _check(keep: float | Tensor) -> None:
    if not isinstance(keep, Tensor) and not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}: expected a probability from 0 to 1")


def reference(
    x: Tensor,
    keep: float | Tensor,
    key: Key,
    start: int = 0,
    base: Tensor | None = None,
    rescale: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Return x - base where the element's uniform number is below `keep`, divided by `keep`; 0 elsewhere.

    What is dropped is 0 whatever it was, NaN too.

    Args:
        x: any shape, any floating type.
        keep: the probability of each element to stay; a number, or a floating tensor that broadcasts to x's shape, whose
            values are the caller's to keep in 0 to 1. Rounded to float32.
        key: which random numbers, from `philox.key`.
        start: the index of x's first element among them: for a block of a tensor, where the block begins.
        base: what to subtract, of x's shape.
        rescale: whether to divide by `keep`, which preserves the expected value.
        out: where to round the result to, of x's shape, and none of the inputs.

    Returns:
        `out`, or a new tensor in the accumulator's type of x and base.

    Raises:
        ValueError: a number `keep` is not in 0 to 1.
    """
    _check(keep)
    dtype = accumulator(x.dtype) if base is None else accumulator(x.dtype, base.dtype)
    result = target(x, dtype, out)
    values, bases = x.reshape(-1), None if base is None else base.reshape(-1)
    each = keep.expand(x.shape).reshape(-1) if isinstance(keep, Tensor) else None
    # A 0-d tensor, not a number: on a GPU torch multiplies by the inverse of a number.
    whole = None if isinstance(keep, Tensor) else torch.tensor(keep, dtype=torch.float32, device=x.device)
    limit = _limit(whole.item()) if whole is not None else 0
    size = span(x)
    stream = Stream(key, min(size, max(1, values.numel())))
    for lo in range(0, values.numel(), size):
        part = values[lo : lo + size]
        value = torch.empty_like(part, dtype=dtype).copy_(part)
        if bases is not None:
            value.sub_(bases[lo : lo + size].to(dtype))
        words = stream.take(start + lo, part.numel())
        if each is None:
            kept, divisor = torch.from_numpy(words < limit).to(x.device), whole
        else:
            divisor = each[lo : lo + size].float()
            uniform = torch.from_numpy((words >> 8).view("int32")).to(x.device).float().mul_(2.0**-24)
            kept = uniform < divisor
        if rescale and divisor is not None:
            value.div_(divisor.to(dtype))
        bits = value.view(torch.int32 if dtype == torch.float32 else torch.int64)
        bits.mul_(kept.to(bits.dtype))  # a product of bits clears NaN too, and masked_fill takes 20 times as long
        result[lo : lo + size] = value
    return deliver(result, x, out)


def _limit(keep: float) -> int:
    """Return the word from which on an element is dropped: the uniform number is a word's upper 24 bits."""
    return math.ceil(keep * 2.0**24) << 8


@triton.jit(do_not_specialize=["seed", "first"])  # type: ignore[untyped-decorator, unused-ignore]
def _drop_kernel(  # type: ignore[no-untyped-def]
    out, x, base, keep, chance, seed, first, count,
    SKIPPED: tl.constexpr, BASED: tl.constexpr, EACH: tl.constexpr, RESCALE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS) - SKIPPED
    inside = (at >= 0) & (at < count)
    value = tl.load(x + at, mask=inside).to(tl.float32)
    if BASED:
        value = value - tl.load(base + at, mask=inside).to(tl.float32)
    likely = tl.zeros_like(value) + chance
    if EACH:
        likely = tl.load(keep + at, mask=inside).to(tl.float32)
    kept = uniform_of(words_of(seed, first, COUNTERS)) < likely
    if RESCALE:
        value = tl.div_rn(value, tl.where(kept, likely, 1.0))
    tl.store(out + at, tl.where(kept, value, 0.0).to(out.dtype.element_ty), mask=inside)


def fast(
    x: Tensor,
    keep: float | Tensor,
    key: Key,
    start: int = 0,
    base: Tensor | None = None,
    rescale: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Do what `reference` does. fp8 is widened and narrowed by torch around the launch."""
    _check(keep)
    inputs = (x,) if base is None else (x, base)
    if torch.float64 in [tensor.dtype for tensor in inputs]:  # Triton passes scalars as float32
        return reference(x, keep, key, start, base, rescale, out)
    x, *bases = [(tensor.float() if tensor.dtype.itemsize == 1 else tensor).contiguous() for tensor in inputs]
    each = keep.expand(x.shape).float().contiguous() if isinstance(keep, Tensor) else x
    direct = out is not None and out.is_contiguous() and out.dtype.itemsize in (2, 4)
    result = out if direct and out is not None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    first, skipped = divmod(start, 4)
    if x.numel():
        _drop_kernel[(triton.cdiv(x.numel() + skipped, 4 * _COUNTERS),)](
            result, x, bases[0] if bases else x, each, 0.0 if isinstance(keep, Tensor) else float(keep),
            seed_of(key), first, x.numel(),
            SKIPPED=skipped, BASED=bool(bases), EACH=isinstance(keep, Tensor), RESCALE=rescale, COUNTERS=_COUNTERS,
        )  # fmt: skip
    return result if out is None or direct else out.copy_(result)


def cases() -> Iterable[Case]:
    """Every input type, starts inside a counter, one probability and one for each, with and without base and rescaling."""
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
    for i, dtype in enumerate(types):
        for count, keep, start in ((1, 1.0, 0), (1024, 0.3, 4 * i), (2051, None, 5 + i), (1021, 0.0, 3)):
            chance = "each" if keep is None else f"{keep:g}"
            name = f"{str(dtype).removeprefix('torch.')}-{count}-{chance}-from-{start}"
            yield Case(name, partial(_make, dtype, count, keep, start, i % 2 == 0), count * (2 * dtype.itemsize + 4))


def _make(
    dtype: torch.dtype, count: int, keep: float | None, start: int, rescale: bool, device: torch.device
) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(count)
    x, base = (torch.randn(count, generator=source).to(dtype).to(device) for _ in range(2))
    chance = torch.rand(count, generator=source).to(device) if keep is None else keep
    return x, chance, key(count, "weight"), start, base if start % 2 == 0 else None, rescale


def large(moved: int) -> Case:
    """Two fp16 tensors in, one float32 tensor out."""
    return Case("fp16-base", partial(_make_large, moved // 8), moved // 8 * 8)


def _make_large(count: int, device: torch.device) -> tuple[Any, ...]:
    x, base = (torch.randn(count, device=device).half() for _ in range(2))
    return x, 0.3, key(0, "large"), 0, base, True, torch.empty(count, device=device)


def plain(x: Tensor, keep: float, _key: Key, _start: int, base: Tensor, _rescale: bool, out: Tensor) -> Tensor:
    """Compute the same from torch's own random numbers."""
    delta = x.float() - base.float()
    return out.copy_(torch.where(torch.rand_like(delta) < keep, delta / keep, 0.0))


drop = Kernel("dropout.drop", reference, fast, cases, large, plain)
