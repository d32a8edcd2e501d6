"""Exact changes of algorithm: Tucker, LoHa, LoKr to LoRA, and anything to the full difference.

LoRA from others: the row-wise and column-wise Kronecker products of factors (face-splitting and Khatri-Rao) make a Hadamard
product of products one product; factors of a Kronecker product are Kronecker products of factors.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.records import Full, LoHa, LoKr, LoRA, Norm, Rows
from sdformats.tensor import Spec
from sdformats.views import Ref, Shaped
from sdmerge.lora.delta import delta, kronecker, needs_weight
from sdmerge.lora.fits import check_fits
from sdmerge.lora.refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

    from sdformats.adapters.record import Record
    from sdformats.tensor import DType


def as_lora(path: str, record: Record, kernel: tuple[int, int] | None = None) -> LoRA:
    """Return a LoRA that makes the same change, at the smallest rank that the factors show.

    Args:
        path: the module, for errors.
        record: a LoRA (with a mid or without), LoHa, LoKr, or rows of one.
        kernel: the module's kernel, where it is a convolution; LoHa and LoKr do not tell.

    Raises:
        CannotHold: the algorithm is no product of factors.
    """
    match record:
        case LoRA(mid=None):
            return record
        case LoRA():
            made = _tucker(record)
        case LoHa():
            made = _loha(record, kernel)
        case LoKr():
            made = _lokr(record, kernel)
        case Rows():
            whole = as_lora(path, record.of, kernel)
            if whole.magnitude is not None and whole.magnitude.axis == "in":
                raise CannotHold("is DoRA over the columns of a fused module", key=path, advice="use --as full")
            up = Computed(partial(_picked, ranges=record.ranges), (whole.up,), _rows_of(whole.up, record.height))
            made = replace(whole, up=up)
        case _:
            raise CannotHold(
                f"is {record.algorithm}, which is no LoRA",
                key=path,
                advice="use --as full with --base MODEL, or extract a LoRA from the baked model",
            )
    return made


def _rows_of(ref: Ref, rows: int) -> Spec:
    return Spec((rows, *ref.shape[1:]), ref.spec.dtype)


def _picked(values: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([values[start:stop] for start, stop in ranges])


def _tucker(record: LoRA) -> LoRA:
    """Put the mid into the down: Σ mid[m,n,…] down[n,i], of the same rank."""
    mid, down = record.mid, record.down
    assert mid is not None, "asked for with a mid"
    shape = (mid.shape[0], down.shape[1], *mid.shape[2:])
    return replace(
        record,
        mid=None,
        down=Computed(_mid_down, (mid, down), Spec(shape, down.spec.dtype)),
        alpha=None if record.alpha is None else record.scale * mid.shape[0],
    )


def _mid_down(mid: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))


def _loha(record: LoHa, kernel: tuple[int, int] | None) -> LoRA:
    """(a1 b1) ⊙ (a2 b2) = (a1 face-splitting a2) (b1 Khatri-Rao b2), of rank r1 r2."""
    if record.t1 is not None and record.t2 is not None:
        out, inner = record.w1_a.shape[1], (record.w1_b.shape[1], *record.t1.shape[2:])
        rank = record.t1.shape[0] * record.t2.shape[0]
        up = Computed(_face_split_t, (record.w1_a, record.w2_a), Spec((out, rank, 1, 1), record.w1_a.spec.dtype))
        operands = (record.t1, record.w1_b, record.t2, record.w2_b)
        down = Computed(_khatri_rao_t, operands, Spec((rank, *inner), record.w1_b.spec.dtype))
        return _lora_of(record, up, down, rank)
    rank = record.w1_b.shape[0] * record.w2_b.shape[0]
    up_shape, down_shape = _shapes(record.w1_a.shape[0], rank, prod(record.w1_b.shape[1:]), kernel)
    up = Computed(_face_split, (record.w1_a, record.w2_a), Spec(up_shape, record.w1_a.spec.dtype))
    down = Computed(_khatri_rao, (record.w1_b, record.w2_b), Spec(down_shape, record.w1_b.spec.dtype))
    return _lora_of(record, up, down, rank)


def _lora_of(record: Record, up: Ref, down: Ref, rank: int) -> LoRA:
    alpha = None if record.scale == 1 else record.scale * rank
    return LoRA(up=up, down=down, alpha=alpha, magnitude=record.magnitude, bias=record.bias)


def _shapes(
    rows: int, rank: int, columns: int, kernel: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of up and down: matrices, or those of a convolution."""
    if kernel is None:
        return (rows, rank), (rank, columns)
    return (rows, rank, 1, 1), (rank, columns // prod(kernel), *kernel)


def _face_split(a1: Tensor, a2: Tensor) -> Tensor:
    a1, a2 = a1.flatten(1), a2.flatten(1)
    return (a1[:, :, None] * a2[:, None, :]).flatten(1)


def _khatri_rao(b1: Tensor, b2: Tensor) -> Tensor:
    b1, b2 = b1.flatten(1), b2.flatten(1)
    return (b1[:, None] * b2[None]).flatten(0, 1)


def _face_split_t(a1: Tensor, a2: Tensor) -> Tensor:
    return _face_split(a1.T, a2.T)


def _khatri_rao_t(t1: Tensor, b1: Tensor, t2: Tensor, b2: Tensor) -> Tensor:
    first, second = (torch.einsum("ijhw,jc->ichw", t, b) for t, b in ((t1, b1), (t2, b2)))
    return _khatri_rao(first, second)


def _lokr(record: LoKr, kernel: tuple[int, int] | None) -> LoRA:
    """(a1 b1) ⊗ (a2 b2) = (a1 ⊗ a2) (b1 ⊗ b2), of rank r1 r2; a whole factor is itself times the identity."""
    first = _pair(record.w1, record.w1_a, record.w1_b)
    second = _pair(record.w2, record.w2_a, record.w2_b) if record.t2 is None else None
    if second is None:
        return _lokr_tucker(record, first)
    sizes = [min(a.shape[0], prod(a.shape[1:])) if b is None else b.shape[0] for a, b in (first, second)]
    rank = sizes[0] * sizes[1]
    rows = prod(a.shape[0] for a, _ in (first, second))
    columns = prod(prod((a if b is None else b).shape[1:]) for a, b in (first, second))
    up_shape, down_shape = _shapes(rows, rank, columns, kernel)
    dtype = record_type(record)
    firsts, seconds = _operands(first), _operands(second)
    up = Computed(partial(_kron_half, split=len(firsts), left=True), (*firsts, *seconds), Spec(up_shape, dtype))
    down = Computed(partial(_kron_half, split=len(firsts), left=False), (*firsts, *seconds), Spec(down_shape, dtype))
    return _lora_of(record, up, down, rank)


def _lokr_tucker(record: LoKr, first: tuple[Ref, Ref | None]) -> LoRA:
    """Take w2 as Σ t2[i,j,…] a[i,o] b[j,c] = aᵀ (t2 b): a product of rank r."""
    t2, a, b = record.t2, record.w2_a, record.w2_b
    assert t2 is not None, "asked for with t2"
    assert a is not None, "assembled with both factors"
    assert b is not None, "assembled with both factors"
    inner = Computed(_mid_down, (t2, b), Spec((t2.shape[0], b.shape[1], *t2.shape[2:]), b.spec.dtype))
    outer = Computed(_transposed, (a,), Spec((a.shape[1], a.shape[0]), a.spec.dtype))
    plain = replace(
        record, t2=None, w2_a=outer, w2_b=Shaped(inner, (inner.shape[0], prod(inner.shape[1:]))), alpha=None
    )
    made = _lokr(plain, (t2.shape[2], t2.shape[3]))
    return replace(made, alpha=None if record.scale == 1 else record.scale * made.rank)


def _transposed(values: Tensor) -> Tensor:
    return values.T


def _pair(whole: Ref | None, a: Ref | None, b: Ref | None) -> tuple[Ref, Ref | None]:
    if whole is not None:
        return whole, None
    assert a is not None, "assembled with both factors"
    return a, b


def _operands(pair: tuple[Ref, Ref | None]) -> tuple[Ref, ...]:
    return (pair[0],) if pair[1] is None else (pair[0], pair[1])


def _kron_half(*values: Tensor, split: int, left: bool) -> Tensor:
    """Return a1 ⊗ a2 or b1 ⊗ b2."""
    first, second = (_half(part, left=left) for part in (values[:split], values[split:]))
    return kronecker(first, second)


def _half(values: tuple[Tensor, ...], *, left: bool) -> Tensor:
    if len(values) == 2:
        return values[0 if left else 1].flatten(1)
    whole = values[0].flatten(1)
    tall = whole.shape[0] > whole.shape[1]
    eye = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return whole if tall == left else eye


def record_type(record: Record) -> DType:
    """Return the type that computed factors are stored in: that of the record's first tensor."""
    return next(ref.spec.dtype for _, ref in record.refs)


def as_full(path: str, record: Record, weight: Ref | None, shape: tuple[int, ...] | None) -> Full | Norm:
    """Return the whole difference that a record makes.

    Args:
        path: the module, for errors.
        record: any.
        weight: the base model's, where the change depends on it.
        shape: the weight's shape; None: as the factors make it.

    Raises:
        CannotHold: the change depends on the weight, which is not given.
        MismatchError: the record is for a weight of another size.
    """
    if isinstance(record, Norm) or (isinstance(record, Full) and not record.replaces):
        return record
    if needs_weight(record) and weight is None:
        raise CannotHold(
            f"is {_what(record)}, whose difference depends on the weight", key=path, advice="give --base MODEL"
        )
    if isinstance(record, Full) and record.new_bias and record.bias is not None:
        raise CannotHold("replaces its bias, which no difference here does", key=path)
    if weight is not None:
        check_fits(path, record, weight.shape, next(weight.stored()).key)
    target = weight.shape if weight is not None else shape if shape is not None else _natural(record)
    refs = tuple(dict.fromkeys(ref for _, ref in record.refs))
    operands = refs if weight is None else (*refs, weight)
    function = partial(_difference, record=record, refs=refs, shape=target)
    return Full(weight=Computed(function, operands, Spec(target, record_type(record))), bias=record.bias)


def _what(record: Record) -> str:
    return "DoRA" if record.magnitude is not None else record.algorithm


def _difference(*values: Tensor, record: Record, refs: tuple[Ref, ...], shape: tuple[int, ...]) -> Tensor:
    read = dict(zip(refs, values, strict=False))
    weight = values[len(refs)] if len(values) > len(refs) else None
    return delta(record, read.__getitem__, weight, shape)


def _natural(record: Record) -> tuple[int, ...]:
    """Return the shape that the factors make, without a base: a matrix, or a convolution where they show its kernel."""
    match record:
        case LoRA():
            return (record.height, record.down.shape[1], *(record.down if record.mid is None else record.mid).shape[2:])
        case LoHa(t1=Ref() as t):
            return (record.height, record.w1_b.shape[1], *t.shape[2:])
        case LoKr(t2=Ref() as t):
            return (record.height, record.columns, *t.shape[2:])
        case LoKr(w2=Ref() as w2) if len(w2.shape) == 4:
            return (record.height, record.columns // prod(w2.shape[2:]), *w2.shape[2:])
        case Rows():
            return (record.height, *_natural(record.of)[1:])
        case _:
            assert record.height is not None, "factors show their rows"
            assert record.columns is not None, "factors show their columns"
            return (record.height, record.columns)
