"""A linear layer with a LoRA beside it, forward and backward: y = x Wᵀ + s (x downᵀ) upᵀ.

The product with the frozen weight is torch's (cuBLAS on a GPU). The low-rank path is added to its result in place, in one
launch that reads x once and keeps the narrow product in registers; what it adds to the gradient of x is the same sum with the
factors' roles changed. So nothing of the output's size is made beside the output, and only x and x downᵀ are kept for the
backward pass. Source: Hu et al., "LoRA" (2021), equation 3.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sdkernels.cast import accumulator
from sdkernels.dot import dot, widened
from sdkernels.kernel import Case, Kernel, programs_of, tl, triton

_ROWS, _COLUMNS, _INNER = 64, 64, 64
_LARGEST_RANK = {2: 128, 4: 64}  # by bytes of an element: what the registers hold
_WIDE_ENOUGH = 4096


def lora_linear(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Return x Wᵀ + b + s (x downᵀ) upᵀ, differentiable once in everything but the scale.

    Under autocast x, weight and bias are taken in its type. The factors may be of another type than x, as float32 masters
    are beside a bfloat16 weight: they are used in x's; their gradients are added up in float32 at least, and are in theirs.

    Args:
        x: [..., in], the type of the weight.
        weight: [out, in].
        down: [rank, in], any floating type.
        up: [out, rank], any floating type.
        scale: s, alpha / rank times the strength.
        bias: [out], or None.

    Returns:
        [..., out], in x's type.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    result: Tensor = _LoraLinear.apply(x, weight, down, up, bias, float(scale))  # type: ignore[no-untyped-call]
    return result


class _LoraLinear(torch.autograd.Function):
    """The weight and the factors are kept as they were given, so that a cast one does not live on for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        with _no_autocast(x.device.type):
            y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            _, hidden = add(_flat(y), _flat(x), down.to(x.dtype), up.to(x.dtype), scale)
        ctx.save_for_backward(x, weight, down, up, hidden)
        ctx.scale = scale
        ctx.bias_type = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        for_x, for_weight, for_down, for_up, for_bias, _ = ctx.needs_input_grad
        narrow = [factor.to(x.dtype) for factor in (down, up)]
        with _no_autocast(x.device.type):
            g, flat = _flat(gradient), _flat(x)
            d_x = d_down = d_up = None
            if for_x:
                d_x = (g @ weight.to(x.dtype)).view(x.shape)
                _, back = add(_flat(d_x), g, narrow[1].T, narrow[0].T, ctx.scale)
            elif for_down:
                back = g @ narrow[1]
            if for_down:
                d_down = outer(back, flat, ctx.scale, down.dtype)
            if for_up:
                d_up = outer(g, hidden, ctx.scale, up.dtype)
            d_weight = outer(g, flat, 1.0, weight.dtype) if for_weight else None
            d_bias = g.sum(0, dtype=accumulator(g.dtype)).to(ctx.bias_type) if for_bias else None
        return d_x, d_weight, d_down, d_up, d_bias, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _no_autocast(kind: str) -> AbstractContextManager[object]:
    """Return a context in which types are what they are: cheap where they are so anyway."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def add_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add s (x downᵀ) upᵀ to `y` in place; the narrow product is rounded to x's type in between.

    Args:
        y: [rows, outer], all of one floating type.
        x: [rows, inner].
        down: [rank, inner].
        up: [outer, rank].
        scale: s.

    Returns:
        `y`, and x downᵀ, [rows, rank].
    """
    hidden = x @ down.T
    return y.addmm_(hidden, up.T, alpha=scale), hidden


def outer_reference(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return s aᵀ b, added up in float32 (float64 where an input is), rounded once.

    Args:
        a: [rows, A], any floating type.
        b: [rows, B], of a's type.
        scale: s.
        dtype: of the result.

    Returns:
        [A, B].
    """
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return (a.T @ b).mul_(scale).to(dtype)
    total = torch.zeros((a.shape[1], b.shape[1]), dtype=wide, device=a.device)
    for lo in range(0, a.shape[0], _WIDE_ENOUGH):  # what is widened stays small
        part = slice(lo, lo + _WIDE_ENOUGH)
        total.addmm_(a[part].to(wide).T, b[part].to(wide))
    return total.mul_(scale).to(dtype)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_kernel(  # type: ignore[no-untyped-def]
    y, hidden, x, down, up, scale, rows, inner, outer, rank, per_program, x_row, down_rank, down_inner, up_outer, up_rank,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, RANK: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """Some rows, and `per_program` columns of y; programs of the same rows each make the narrow product again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    here, ranked = (row < rows)[:, None], ranks < rank
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, inner, INNER):
        at = start + tl.arange(0, INNER)
        left = tl.load(x + row[:, None] * x_row + at[None, :], mask=here & (at < inner)[None, :], other=0.0)
        place = down + ranks[None, :] * down_rank + at[:, None] * down_inner
        right = tl.load(place, mask=ranked[None, :] & (at < inner)[:, None], other=0.0)
        total = dot(left, right, total, WIDENED)
    narrow = total.to(hidden.dtype.element_ty)
    first = tl.program_id(1) * per_program
    if first == 0:
        tl.store(hidden + row[:, None] * rank + ranks[None, :], narrow, mask=here & ranked[None, :])
    for start in range(first, tl.minimum(first + per_program, outer), OUTER):
        at = start + tl.arange(0, OUTER)
        place = up + at[None, :] * up_outer + ranks[:, None] * up_rank
        right = tl.load(place, mask=(at < outer)[None, :] & ranked[:, None], other=0.0)
        product = dot(narrow, right, tl.zeros((ROWS, OUTER), dtype=tl.float32), WIDENED)
        place = y + row[:, None] * outer + at[None, :]
        inside = here & (at < outer)[None, :]
        value = tl.fma(product, tl.zeros_like(product) + scale, tl.load(place, mask=inside, other=0.0).to(tl.float32))
        tl.store(place, value.to(y.dtype.element_ty), mask=inside)


def add_fast(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Do what `add_reference` does, in one launch for ranks up to 128 in types of 16 bits, and 64 in float32."""
    rank, inner = down.shape
    if rank > _LARGEST_RANK.get(y.dtype.itemsize, 0) or not y.is_contiguous() or not y.numel() or not rank:
        return add_reference(y, x, down, up, scale)
    x = x if x.stride(1) == 1 else x.contiguous()
    hidden = torch.empty((x.shape[0], rank), dtype=x.dtype, device=x.device)
    blocks, tiles = triton.cdiv(y.shape[0], _ROWS), triton.cdiv(y.shape[1], _COLUMNS)
    parts = min(tiles, triton.cdiv(programs_of(y.device), blocks))  # few rows would leave most of the GPU idle
    per_program = triton.cdiv(tiles, parts) * _COLUMNS
    _add_kernel[(blocks, triton.cdiv(y.shape[1], per_program))](
        y, hidden, x, down, up, float(scale), y.shape[0], inner, y.shape[1], rank, per_program,
        x.stride(0), *down.stride(), *up.stride(),
        ROWS=_ROWS, INNER=_INNER, OUTER=_COLUMNS, RANK=max(16, triton.next_power_of_2(rank)),
        WIDENED=widened(x.dtype),
    )  # fmt: skip
    return y, hidden


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _outer_kernel(  # type: ignore[no-untyped-def]
    sums, a, b, rows, left, right, per_program, a_row, b_row,
    ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """One tile of aᵀ b over `per_program` of the rows; sums is [parts, left, right]."""
    across = tl.cdiv(right, RIGHT)
    i = (tl.program_id(0) // across) * LEFT + tl.arange(0, LEFT)
    j = (tl.program_id(0) % across) * RIGHT + tl.arange(0, RIGHT)
    part = tl.program_id(1).to(tl.int64)
    first = part * per_program
    last = tl.minimum(first + per_program, rows)
    total = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < last
        x = tl.load(a + row[None, :] * a_row + i[:, None], mask=inside[None, :] & (i < left)[:, None], other=0.0)
        y = tl.load(b + row[:, None] * b_row + j[None, :], mask=inside[:, None] & (j < right)[None, :], other=0.0)
        total = dot(x, y, total, WIDENED)
    place = sums + part * left * right + i[:, None] * right + j[None, :]
    tl.store(place, total, mask=(i < left)[:, None] & (j < right)[None, :])


def outer_fast(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Do what `outer_reference` does: rows in parts, whose sums are added up in their order."""
    if a.dtype.itemsize not in (2, 4) or not a.numel() or not b.numel():
        return outer_reference(a, b, scale, dtype)
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    left, right = (min(_COLUMNS, max(16, triton.next_power_of_2(x.shape[1]))) for x in (a, b))
    tiles = triton.cdiv(a.shape[1], left) * triton.cdiv(b.shape[1], right)
    parts = min(triton.cdiv(a.shape[0], _ROWS), triton.cdiv(programs_of(a.device), tiles))
    per_program = triton.cdiv(triton.cdiv(a.shape[0], parts), _ROWS) * _ROWS
    parts = triton.cdiv(a.shape[0], per_program)
    sums = torch.empty((parts, a.shape[1], b.shape[1]), dtype=torch.float32, device=a.device)
    _outer_kernel[(tiles, parts)](
        sums, a, b, a.shape[0], a.shape[1], b.shape[1], per_program, a.stride(0), b.stride(0),
        ROWS=_ROWS, LEFT=left, RIGHT=right, WIDENED=widened(a.dtype),
    )  # fmt: skip
    return sums.sum(0).mul_(scale).to(dtype)


def add_cases() -> Iterable[Case]:
    """Sizes around the tiles, ranks around 16, both layouts of the factors; sums that are exact in any order."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, inner, width, rank, turned in (
            (1, 64, 64, 16, False), (65, 63, 130, 4, False), (64, 100, 200, 17, True), (130, 65, 63, 128, False),
            (3, 5, 700, 1, True), (33, 64, 64, 130, False), (17, 32, 80, 64, False), (0, 8, 8, 2, False),
        ):  # fmt: skip
            name = f"{str(dtype).removeprefix('torch.')}-{rows}x{inner}-{width}-rank-{rank}{'-turned' * turned}"
            size = (rows * (inner + 2 * width + rank) + rank * (inner + width)) * dtype.itemsize
            yield Case(name, partial(_make_add, dtype, rows, inner, width, rank, turned), size)


def _make_add(
    dtype: torch.dtype, rows: int, inner: int, width: int, rank: int, turned: bool, device: torch.device
) -> tuple[Any, ...]:
    """Return small whole numbers: products of them are summed without rounding, and bfloat16 holds the narrow ones."""
    source = torch.Generator().manual_seed(rows)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=source).to(dtype).to(device)

    down, up = (whole(inner, rank).T, whole(rank, width).T) if turned else (whole(rank, inner), whole(width, rank))
    return whole(rows, width), whole(rows, inner), down, up, 0.125


def outer_cases() -> Iterable[Case]:
    """Sizes around the tiles, one part and several, results of another type; sums that are exact in any order."""
    for dtype, to in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        for rows, left, right in ((1, 16, 64), (65, 4, 130), (640, 70, 17), (2000, 1, 65), (0, 3, 4)):
            name = f"{str(dtype).removeprefix('torch.')}-{rows}-{left}x{right}"
            size = rows * (left + right) * dtype.itemsize + left * right * to.itemsize
            yield Case(name, partial(_make_outer, dtype, to, rows, left, right), size)


def _make_outer(
    dtype: torch.dtype, to: torch.dtype, rows: int, left: int, right: int, device: torch.device
) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(rows)
    a, b = (torch.randint(-1, 2, (rows, n), generator=source).to(dtype).to(device) for n in (left, right))
    return a, b, 0.5, to


def add_large(moved: int) -> Case:
    """A layer of 1280 by 1280 and rank 16 in bfloat16."""
    width, rank, size = 1280, 16, 2
    rows = (moved // size - 2 * rank * width) // (3 * width + rank)
    total = (rows * (3 * width + rank) + 2 * rank * width) * size
    return Case("bf16-1280-rank-16", partial(_make_add, torch.bfloat16, rows, width, width, rank, False), total)


def add_plain(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add it as layers do that know nothing of each other."""
    return y + linear(linear(x, down), up) * scale


def outer_large(moved: int) -> Case:
    """The gradient of a factor of rank 16 and 1280 columns, in bfloat16."""
    rows = (moved - 4 * 16 * 1280) // (2 * (16 + 1280))
    total = rows * 2 * (16 + 1280) + 4 * 16 * 1280
    return Case("bf16-1280-rank-16", partial(_make_outer, torch.bfloat16, torch.float32, rows, 16, 1280), total)


def outer_plain(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Multiply in the inputs' type."""
    return (scale * a.T @ b).to(dtype)


add = Kernel("lora_linear.add", add_reference, add_fast, add_cases, add_large, add_plain)
outer = Kernel("lora_linear.outer", outer_reference, outer_fast, outer_cases, outer_large, outer_plain)
