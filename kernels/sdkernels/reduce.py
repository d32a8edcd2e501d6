"""Norms and dot products of several tensors at once, in float64: cosines, angles and lengths follow from them."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdkernels.cast import accumulator
from sdkernels.kernel import Case, Kernel, tl, triton

# Below 32,768 elements torch sums in one thread, whatever it may use, so the order of the sum never depends on that.
_SPAN = 1 << 14
_GROUP = 2
_BLOCKS = {1: 2048, 2: 2048, 3: 512, 4: 512}  # by tensors: ten float64 sums for each element must fit the registers
_PIECE = 1 << 16


def reference(tensors: Sequence[Tensor], center: Tensor | None = None, rows: bool = False) -> Tensor:
    """Return the dot product of every tensor with every other and with itself.

    Differences to `center` are taken in the accumulator's type; products and sums are in float64, in an order that
    depends on nothing but the shape.

    Args:
        tensors: at least one; all of one shape, any floating types.
        center: what to subtract from each, of the same shape.
        rows: whether to give one matrix for each index of the first dimension. A 0-d tensor is one row.

    Returns:
        float64 [n, n] for n tensors, or [rows, n, n]. Symmetric, zero where there are no elements.
    """
    values, middle = _as_rows(tensors, center, rows)
    count, length = values[0].shape
    result = torch.zeros((count, len(values), len(values)), dtype=torch.float64, device=values[0].device)
    wide = min(length, _SPAN)
    high = max(1, _SPAN // max(1, wide))
    for top in range(0, count if length else 0, high):
        for left in range(0, length, wide):
            area = slice(top, top + high), slice(left, left + wide)
            parts = [_widened(x[area], None if middle is None else middle[area]) for x in values]
            for i, x in enumerate(parts):
                for j, y in enumerate(parts[: i + 1]):
                    result[area[0], i, j] += (x * y).sum(-1)
    for i in range(len(values)):
        for j in range(i):
            result[:, j, i] = result[:, i, j]
    return result if rows else result[0]


def _as_rows(tensors: Sequence[Tensor], center: Tensor | None, rows: bool) -> tuple[list[Tensor], Tensor | None]:
    shape = tensors[0].shape
    count = shape[0] if rows and shape else 1
    size = (count, shape.numel() // count if count else 0)
    return [x.reshape(size) for x in tensors], None if center is None else center.reshape(size)


def _widened(x: Tensor, center: Tensor | None) -> Tensor:
    if center is None:
        return x.double()
    dtype = accumulator(x.dtype, center.dtype)
    return (x.to(dtype) - center.to(dtype)).double()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(x, center, at, inside, CENTERED: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        value = value - tl.load(center + at, mask=inside, other=0.0).to(tl.float32)
    return value.to(tl.float64)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gram_kernel(  # type: ignore[no-untyped-def]
    out, x0, x1, x2, x3, center, length, piece, pieces,
    TENSORS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up one piece of one row; out is [rows * pieces, 10], the lower triangle row by row."""
    program = tl.program_id(0).to(tl.int64)
    begin = (program % pieces) * piece
    row = (program // pieces) * length
    end = tl.minimum(begin + piece, length)
    s00 = tl.zeros((BLOCK,), dtype=tl.float64)
    s10, s11, s20, s21, s22, s30, s31, s32, s33 = s00, s00, s00, s00, s00, s00, s00, s00, s00
    for lo in range(begin, end, BLOCK):
        at = lo + tl.arange(0, BLOCK)
        inside = at < end
        v0 = _load(x0, center, row + at, inside, CENTERED)
        s00 = tl.fma(v0, v0, s00)
        if TENSORS > 1:
            v1 = _load(x1, center, row + at, inside, CENTERED)
            s10 = tl.fma(v1, v0, s10)
            s11 = tl.fma(v1, v1, s11)
        if TENSORS > 2:
            v2 = _load(x2, center, row + at, inside, CENTERED)
            s20 = tl.fma(v2, v0, s20)
            s21 = tl.fma(v2, v1, s21)
            s22 = tl.fma(v2, v2, s22)
        if TENSORS > 3:
            v3 = _load(x3, center, row + at, inside, CENTERED)
            s30 = tl.fma(v3, v0, s30)
            s31 = tl.fma(v3, v1, s31)
            s32 = tl.fma(v3, v2, s32)
            s33 = tl.fma(v3, v3, s33)
    to = out + program * 10
    tl.store(to, tl.sum(s00))
    if TENSORS > 1:
        tl.store(to + 1, tl.sum(s10))
        tl.store(to + 2, tl.sum(s11))
    if TENSORS > 2:
        tl.store(to + 3, tl.sum(s20))
        tl.store(to + 4, tl.sum(s21))
        tl.store(to + 5, tl.sum(s22))
    if TENSORS > 3:
        tl.store(to + 6, tl.sum(s30))
        tl.store(to + 7, tl.sum(s31))
        tl.store(to + 8, tl.sum(s32))
        tl.store(to + 9, tl.sum(s33))


def fast(tensors: Sequence[Tensor], center: Tensor | None = None, rows: bool = False) -> Tensor:
    """Do what `reference` does: tensors in groups of two, each pair of groups in one launch."""
    inputs = [*tensors] if center is None else [*tensors, center]
    if torch.float64 in [x.dtype for x in inputs]:
        return reference(tensors, center, rows)
    values, middle = _as_rows([_plain_type(x) for x in tensors], None if center is None else _plain_type(center), rows)
    count, n = values[0].shape[0], len(values)
    result = torch.zeros((count, n, n), dtype=torch.float64, device=values[0].device)
    groups = [range(lo, min(lo + _GROUP, n)) for lo in range(0, n, _GROUP)]
    pairs = [(p, q) for i, p in enumerate(groups) for q in groups[i + 1 :]] or [(groups[0], range(0))]
    for first, second in pairs if values[0].numel() else []:
        chosen = [*first, *second]
        sums = _launch([values[i] for i in chosen], middle)
        for k, i in enumerate(chosen):
            for m, j in enumerate(chosen[: k + 1]):
                result[:, i, j] = result[:, j, i] = sums[:, k * (k + 1) // 2 + m]
    return result if rows else result[0]


def _plain_type(x: Tensor) -> Tensor:
    return (x.float() if x.dtype.itemsize == 1 else x).contiguous()


def _launch(values: list[Tensor], center: Tensor | None) -> Tensor:
    count, length = values[0].shape
    pieces = triton.cdiv(length, _PIECE)
    sums = torch.zeros((count, pieces, 10), dtype=torch.float64, device=values[0].device)
    spare = [values[0]] * (2 * _GROUP - len(values))
    block = _BLOCKS[len(values)]
    while block >= 2 * length and block > 1:
        block //= 2
    _gram_kernel[(count * pieces,)](
        sums, *values, *spare, values[0] if center is None else center, length, _PIECE, pieces,
        TENSORS=len(values), CENTERED=center is not None, BLOCK=block,
    )  # fmt: skip
    return sums.sum(1)


def cases() -> Iterable[Case]:
    """Every input type, one to five tensors, whole and by row, with and without a center, rows of one element."""
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
    forms = (
        ((1,), 1, False, False), ((3, 1000), 2, True, False), ((70_000,), 2, False, False), ((5, 2049), 3, True, True),
        ((6,), 2, False, True), ((), 2, True, True), ((0, 4), 2, False, True), ((4, 0), 2, False, True),
        ((40, 30), 5, False, False),
    )  # fmt: skip
    for dtype in types:
        for shape, n, centered, rows in forms:
            name = f"{str(dtype).removeprefix('torch.')}-{shape}-{n}{'-center' * centered}{'-rows' * rows}"
            moved = torch.Size(shape).numel() * dtype.itemsize * (n + centered)
            yield Case(name, partial(_make, dtype, shape, n, centered, rows), moved)


def _make(
    dtype: torch.dtype, shape: tuple[int, ...], n: int, centered: bool, rows: bool, device: torch.device
) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(n)
    made = [torch.randn(shape, generator=source).to(dtype).to(device) for _ in range(n + 1)]
    return made[:n], made[n] if centered else None, rows


def large(moved: int) -> Case:
    """Two fp16 tensors in, a matrix out."""
    return Case("fp16-2", partial(_make, torch.float16, (moved // 4,), 2, False, False), moved // 4 * 4)


def plain(tensors: Sequence[Tensor], _center: None, _rows: bool) -> Tensor:
    """Compute in float32, as a user would."""
    a, b = (x.float() for x in tensors)
    return torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()])


gram = Kernel("reduce.gram", reference, fast, cases, large, plain, tolerance=1e-12)
