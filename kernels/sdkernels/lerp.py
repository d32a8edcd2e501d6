"""Interpolation between two tensors, from the nearer end."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdkernels.cast import accumulator
from sdkernels.flat import deliver, span, target
from sdkernels.kernel import Case, Kernel, tl, triton

_BLOCK = 1024


def reference(a: Tensor, b: Tensor, t: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return a + t (b - a) where t <= 0.5, else b + (1 - t) (a - b), with a fused multiply-add.

    So t = 0 gives a and t = 1 gives b, and the error is that of the nearer end.

    Args:
        a: any shape, any floating type.
        b: of a's shape, any floating type.
        t: a number, or a floating tensor that broadcasts to a's shape, rounded to the accumulator's type; any value:
            beyond 0 to 1 it extrapolates.
        out: where to round the result to, of a's shape, and none of the inputs.

    Returns:
        `out`, or a new tensor in the accumulator's type of a and b.
    """
    dtype = accumulator(a.dtype, b.dtype)
    result = target(a, dtype, out)
    blocks, step = _blocks(a, b, t, result)
    for lo in range(0, blocks[0].shape[0], step):
        x, y, w, into = (block[lo : lo + step] if isinstance(block, Tensor) else block for block in blocks)
        x, y = x.to(dtype), y.to(dtype)
        if not isinstance(w, Tensor):
            near, other, w = (y, x, 1 - w) if w > 0.5 else (x, y, w)
            into.copy_(torch.add(near, other - near, alpha=w))
            continue
        w = w.to(dtype)
        near, other = _swapped(x, y, w > 0.5)
        into.copy_(torch.addcmul(near, torch.minimum(w, 1 - w), other.sub_(near)))
    return deliver(result, a, out)


def _swapped(x: Tensor, y: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Return new tensors with x and y exchanged in places: on the bits, ten times as fast as two `torch.where`."""
    kind = torch.int32 if x.dtype == torch.float32 else torch.int64
    xs, ys = x.view(kind), y.view(kind)
    change = (xs ^ ys).mul_(where.to(kind))
    return (xs ^ change).view(x.dtype), change.bitwise_xor_(ys).view(x.dtype)


def _blocks(a: Tensor, b: Tensor, t: float | Tensor, result: Tensor) -> tuple[tuple[Any, ...], int]:
    """Return a, b, t and result in the shape that is cut along its first dimension, and how much of it is a block.

    All are flat, except where t has fewer values than a: then a keeps its shape, so that t need not be written out.
    """
    size = span(a)
    if not isinstance(t, Tensor):
        return (a.reshape(-1), b.reshape(-1), t, result), size
    if t.numel() == a.numel() or t.numel() == 1 or a.ndim < 2:
        return (a.reshape(-1), b.reshape(-1), t.expand(a.shape).reshape(-1), result), size
    row = max(1, a.numel() // max(1, a.shape[0]))
    return (a, b, t.expand(a.shape), result.view(a.shape)), max(1, size // row)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _blend_kernel(  # type: ignore[no-untyped-def]
    out, a, b, t, whole, rest, count, inner, EACH: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(a + at, mask=inside).to(tl.float32)
    y = tl.load(b + at, mask=inside).to(tl.float32)
    if EACH:
        w = tl.load(t + at // inner, mask=inside).to(tl.float32)
        far = w > 0.5
        near = tl.where(far, y, x)
        total = tl.fma(tl.where(far, x, y) - near, tl.where(far, 1.0 - w, w), near)
    elif FAR:
        total = tl.fma(x - y, tl.zeros_like(x) + rest, y)
    else:
        total = tl.fma(y - x, tl.zeros_like(x) + whole, x)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def fast(a: Tensor, b: Tensor, t: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Do what `reference` does. fp8 is widened and narrowed by torch around the launch."""
    if torch.float64 in (a.dtype, b.dtype):  # Triton passes scalars as float32
        return reference(a, b, t, out)
    x, y = ((tensor.float() if tensor.dtype.itemsize == 1 else tensor).contiguous() for tensor in (a, b))
    direct = out is not None and out.is_contiguous() and out.dtype.itemsize in (2, 4)
    result = out if direct and out is not None else torch.empty(a.shape, dtype=torch.float32, device=a.device)
    each, inner, whole = x, 1, 0.0
    if isinstance(t, Tensor):
        each, inner = _repeats(t.float(), a)
    else:
        whole = float(t)
    if a.numel():
        _blend_kernel[(triton.cdiv(a.numel(), _BLOCK),)](
            result, x, y, each, whole, 1 - whole, a.numel(), inner,
            EACH=isinstance(t, Tensor), FAR=whole > 0.5, BLOCK=_BLOCK,
        )  # fmt: skip
    return result if out is None or direct else out.copy_(result)


def _repeats(t: Tensor, a: Tensor) -> tuple[Tensor, int]:
    """Return t's values and how many elements of a each stands for, one after the other."""
    padded = (1,) * (a.ndim - t.ndim) + tuple(t.shape)
    leading = 0
    while leading < a.ndim and padded[leading] == a.shape[leading]:
        leading += 1
    if all(size == 1 for size in padded[leading:]):
        return t.contiguous(), max(1, a[(0,) * leading].numel()) if a.numel() else 1
    return t.expand(a.shape).contiguous(), 1


def cases() -> Iterable[Case]:
    """Every input type, sizes around the block, t as a number near either end or beyond, for each element, each row."""
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
    forms: tuple[tuple[tuple[int, ...], Any], ...] = (
        ((1,), 0.5), ((), 0.9), ((1023,), 0.7), ((4, 513), 1.5), ((3, 1025), (3, 1025)), ((5, 7, 31), (5, 1, 1)),
        ((4, 300), (300,)), ((1024,), ()), ((2, 0), (2, 1)),
    )  # fmt: skip
    for dtype in types:
        for shape, t in forms:
            count = torch.Size(shape).numel()
            name = f"{str(dtype).removeprefix('torch.')}-{shape}-{t}"
            yield Case(name, partial(_make, dtype, shape, t), 3 * count * dtype.itemsize)


def _make(dtype: torch.dtype, shape: tuple[int, ...], t: Any, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(len(shape))
    a, b = (torch.randn(shape, generator=source).to(dtype).to(device) for _ in range(2))
    weight = t if isinstance(t, float) else torch.rand(t, generator=source).to(device)
    return a, b, weight, torch.empty(shape, dtype=dtype, device=device)


def large(moved: int) -> Case:
    """Two fp16 tensors in, one out."""
    return Case("fp16", partial(_make, torch.float16, (moved // 6,), 0.3), moved // 6 * 6)


def plain(a: Tensor, b: Tensor, t: float, out: Tensor) -> Tensor:
    """Compute in float32, as a user would."""
    return out.copy_((1 - t) * a.float() + t * b.float())


blend = Kernel("lerp.blend", reference, fast, cases, large, plain)
