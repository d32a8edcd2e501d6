"""Linear combinations: Σ w·x and Σ w·(x − y), in float32, rounded once.

Terms are either ``(w, x)``, worth w·x, or ``(w, x, y)``, worth w·(x − y) with the difference taken first. The
difference form is exact where x = y and rounds wrongly far more rarely than the same sum term by term: in fp16 models
x and y are close to each other, so their difference has no rounding error at all in float32.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdkernels.cast import accumulator
from sdkernels.flat import deliver, span, target
from sdkernels.kernel import Case, Kernel, tl, triton
from sdkernels.native import combine_into

Term = tuple[float, Tensor] | tuple[float, Tensor, Tensor]
"""``(w, x)`` or ``(w, x, y)``: floating tensors of one shape."""

_TERMS_PER_LAUNCH = 4
_AT_ONCE = 1 << 18  # a runner's block: smaller spans would stay in the cache as well, and cost more calls
_BLOCK = 1024


def _dtypes(terms: Sequence[Term]) -> list[torch.dtype]:
    return [x.dtype for _, *tensors in terms for x in tensors]


def reference(terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """Add up `terms`, in order, each after the first with a fused multiply-add.

    Span by span, tensors are widened one by one, just before they are used, and what was widened is computed on in place:
    on a CPU the few buffers stay in the cache, which decides the speed.

    Args:
        terms: at least one; all tensors have one shape, any floating type.
        out: where to round the sum to, of the same shape, any floating type, and none of the terms' tensors.

    Returns:
        `out`, or a new tensor in the accumulator's type (float32; float64 where a term has it).
    """
    first = terms[0][1]
    size = span(first)
    if first.numel() <= _AT_ONCE:
        return _sum(terms, out)
    flat = {id(x): x.reshape(-1) for _, *tensors in terms for x in tensors}
    result = target(first, accumulator(*_dtypes(terms)), out)
    for lo in range(0, first.numel(), size):
        parts = {name: x[lo : lo + size] for name, x in flat.items()}  # a tensor in two terms is still one
        _sum([_replaced(term, parts) for term in terms], result[lo : lo + size])
    return deliver(result, first, out)


def _replaced(term: Term, parts: dict[int, Tensor]) -> Term:
    if len(term) == 3:
        return term[0], parts[id(term[1])], parts[id(term[2])]
    return term[0], parts[id(term[1])]


def _sum(terms: Sequence[Term], out: Tensor | None) -> Tensor:
    widen = _Widener(terms)
    total: Tensor | None = None
    ours = False
    for weight, first, *second in terms:
        value, free = widen(first)
        if second:
            other, _ = widen(second[0])
            value = value.sub_(other) if free else value - other
            free = True
        if total is not None:
            total = total.add_(value, alpha=weight) if ours else torch.add(total, value, alpha=weight)
            ours = True
        elif weight == 1:
            total, ours = value, free
        else:
            total, ours = value * weight, True
    assert total is not None, "a sum of no terms has no shape"
    if out is not None:
        return out.copy_(total)
    return total if ours else total.clone()


class _Widener:
    """Widens each tensor once, and tells whether the result may be overwritten."""

    def __init__(self, terms: Sequence[Term]) -> None:
        tensors = [x for term in terms for x in term[1:]]
        self._dtype = accumulator(*[x.dtype for x in tensors])
        seen: set[int] = set()
        self._repeated = {id(x) for x in tensors if id(x) in seen or seen.add(id(x))}  # type: ignore[func-returns-value]
        self._shared: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, bool]:
        if id(x) not in self._repeated:
            return x.to(self._dtype), x.dtype != self._dtype
        if id(x) not in self._shared:
            self._shared[id(x)] = x.to(self._dtype)
        return self._shared[id(x)], False


def native(terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """Do what `reference` does in one pass over the memory: see native.c."""
    made = torch.empty(terms[0][1].shape) if out is None else out
    return made if combine_into(terms, made) is not None else reference(terms, out)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_term(total, x, y, weight, at, inside, PAIRED: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(x + at, mask=inside).to(tl.float32)
    if PAIRED:
        value = value - tl.load(y + at, mask=inside).to(tl.float32)
    return tl.fma(value, tl.zeros_like(value) + weight, total)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum_kernel(  # type: ignore[no-untyped-def]
    out, partial_sum, x0, x1, x2, x3, y0, y1, y2, y3, w0, w1, w2, w3, count,
    TERMS: tl.constexpr, PAIRS: tl.constexpr, CONTINUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if CONTINUES:
        total = tl.load(partial_sum + at, mask=inside)
    total = _add_term(total, x0, y0, w0, at, inside, PAIRS & 1)
    if TERMS > 1:
        total = _add_term(total, x1, y1, w1, at, inside, PAIRS & 2)
    if TERMS > 2:
        total = _add_term(total, x2, y2, w2, at, inside, PAIRS & 4)
    if TERMS > 3:
        total = _add_term(total, x3, y3, w3, at, inside, PAIRS & 8)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def fast(terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """Do what `reference` does, four terms a launch.

    fp8 is widened and narrowed by torch around the launch: before compute capability 8.9 Triton has no float8_e4m3fn, and
    its interpreter rounds to fp8 wrongly.
    """
    dtypes = _dtypes(terms)
    if torch.float64 in dtypes:  # Triton passes scalars as float32
        return reference(terms, out)
    if any(dtype.itemsize == 1 for dtype in dtypes):
        return fast([_widened(term) for term in terms], out)
    first = terms[0][1]
    count = first.numel()
    direct = out is not None and out.dtype.itemsize > 1 and out.dtype != torch.float64 and out.is_contiguous()
    target = out if direct and out is not None else torch.empty(first.shape, dtype=torch.float32, device=first.device)
    total: Tensor | None = None
    for start in range(0, len(terms) if count else 0, _TERMS_PER_LAUNCH):
        group = terms[start : start + _TERMS_PER_LAUNCH]
        last = start + len(group) == len(terms)
        into = target if last else torch.empty(first.shape, dtype=torch.float32, device=first.device)
        _launch(group, into, total, count)
        total = into
    return target if out is None or direct else out.copy_(target)


def _widened(term: Term) -> Term:
    if len(term) == 3:
        return term[0], term[1].float(), term[2].float()
    return term[0], term[1].float()


def _launch(group: Sequence[Term], into: Tensor, total: Tensor | None, count: int) -> None:
    spare = group[0][1]
    missing = _TERMS_PER_LAUNCH - len(group)
    xs = [term[1].contiguous() for term in group] + [spare] * missing
    ys = [term[2].contiguous() if len(term) == 3 else spare for term in group] + [spare] * missing
    weights = [float(term[0]) for term in group] + [0.0] * missing
    pairs = sum(1 << i for i, term in enumerate(group) if len(term) == 3)
    grid = (triton.cdiv(count, _BLOCK),)
    _sum_kernel[grid](
        into, into if total is None else total, *xs, *ys, *weights, count,
        TERMS=len(group), PAIRS=pairs, CONTINUES=total is not None, BLOCK=_BLOCK,
    )  # fmt: skip


def cases() -> Iterable[Case]:
    """Sizes around the block, every input type, one to six terms, with and without differences."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        for count, forms in ((1, "d"), (1023, "xd"), (1024, "xx"), (4097, "xxx"), (2050, "dxdxxd")):
            name = f"{str(dtype).removeprefix('torch.')}-{count}-{forms}"
            tensors = sum(2 if form == "d" else 1 for form in forms)
            moved = count * dtype.itemsize * (tensors + 1)
            yield Case(name, partial(_make, dtype, count, forms), moved)


def _make(dtype: torch.dtype, count: int, forms: str, device: torch.device) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(count)

    def tensor() -> Tensor:
        return torch.randn(count, generator=source).to(dtype).to(device)

    terms = tuple(
        (0.7 - 0.2 * i, tensor(), tensor()) if form == "d" else (0.3 + 0.1 * i, tensor())
        for i, form in enumerate(forms)
    )
    return terms, torch.empty(count, dtype=dtype, device=device)


def large(moved: int) -> Case:
    """A + 0.7 (B - C) in fp16: three tensors in, one out."""
    return Case("fp16-add-difference", partial(_make, torch.float16, moved // 8, "xd"), moved // 8 * 8)


def plain(terms: Sequence[Any], out: Tensor) -> Tensor:
    """Compute in float32, as a user would."""
    (first, a), (second, b, c) = terms
    return out.copy_(first * a.float() + second * (b.float() - c.float()))


combine = Kernel("linear.combine", reference, fast, cases, large, plain, native=native)
