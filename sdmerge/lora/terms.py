"""Sums of adapters, module by module: what is stacked in factors, what is added up, and what is no part of a sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from sdformats.adapters.names import kernel_of
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, InputOFT, LoRA, Norm, Rows
from sdformats.tensor import DType, Spec
from sdmerge.errors import MismatchError, NonFiniteInput, RequestError
from sdmerge.lora.algebra import as_full, as_lora
from sdmerge.lora.held import Held
from sdmerge.lora.refs import Computed, value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdformats.adapters.record import Record
    from sdformats.views import Ref


@dataclass(frozen=True)
class Term:
    """One adapter's part in a module's sum.

    Attributes:
        record: what it changes.
        strength: what that is multiplied with.
        index: which adapter it is.
    """

    record: Record
    strength: float
    index: int = 0


@dataclass(frozen=True)
class Product:
    """A term as factor · up · down.

    Attributes:
        lora: the factors, without a mid.
        factor: strength times scale.
        index: which adapter it is.
    """

    lora: LoRA
    factor: float
    index: int


def products_of(path: str, terms: Sequence[Term], family: str | None) -> tuple[Product, ...] | None:
    """Return a module's terms as products of factors; None where one of them is a difference, so that all are added up.

    Raises:
        RequestError: a change depends on the weight.
        MismatchError: the terms are for modules of different shapes.
    """
    for term in terms:
        _check(path, term.record)
    if any(isinstance(term.record, Norm | Full) for term in terms):
        return None
    found = []
    for term in terms:
        lora = as_lora(path, term.record, kernel_of(path, family))
        found.append(Product(lora, term.strength * lora.scale, term.index))
    first = found[0].lora
    for other in found[1:]:
        if (other.lora.height, other.lora.columns, other.lora.reshape) != (first.height, first.columns, first.reshape):
            raise MismatchError(
                f"{path}: the adapters change {first.height}x{first.columns} and {other.lora.height}x{other.lora.columns} "
                "numbers (expected adapters for one model)"
            )
    return tuple(found)


def _check(path: str, record: Record) -> None:
    of = record.of if isinstance(record, Rows) else record
    if of.magnitude is not None or isinstance(of, IA3 | GLoRA | OFT | InputOFT):
        what = "DoRA" if of.magnitude is not None else of.algorithm
        raise RequestError(f"{path}: is {what}, which depends on the model's weights; bake it, then extract a LoRA")
    if isinstance(of, Full) and of.replaces:
        raise RequestError(f"{path}: is a new weight and no difference; convert it with --as full --base MODEL first")


def inner_of(products: Sequence[Product]) -> tuple[int, ...]:
    """Return the shape of a row: (in,), or (in, kh, kw) where one of the adapters shows a kernel."""
    shapes = [product.lora.down.shape[1:] for product in products]
    return next((shape for shape in shapes if len(shape) == 3), shapes[0])


def factors_of(path: str, products: Sequence[Product]) -> tuple[Tensor, Tensor]:
    """Read the factors, and put them beside each other: (m, Σ r) times (Σ r, n) is the sum.

    Raises:
        NonFiniteInput: there is no sum.
    """
    ups = torch.cat([value(one.lora.up).flatten(1) * one.factor for one in products], 1)
    downs = torch.cat([value(one.lora.down).flatten(1) for one in products])
    if not math.isfinite(float(ups.sum()) + float(downs.sum())):
        raise NonFiniteInput(f"{path}: holds NaN or infinity, which has no singular values; repair the adapter")
    return ups, downs


def stacked(products: Sequence[Product], *, exact: bool, alpha: bool) -> LoRA:
    """Return the sum as one LoRA of rank Σ r, or as a matrix times the identity where that is smaller.

    Args:
        products: of one module, none with the factor 0.
        exact: write float32 where the first one's type would round; otherwise its type.
        alpha: whether the layout holds one, so that a common factor needs no multiplication.
    """
    rank = sum(one.lora.rank for one in products)
    first, inner = products[0], inner_of(products)
    if rank > min(first.lora.height, math.prod(inner)):
        return _whole(products, exact=exact)
    common = abs(first.factor) if alpha else 1.0
    refs = [ref for one in products for ref in (one.lora.up, one.lora.down)]
    stored = len({ref.spec.dtype for ref in refs}) == 1 and not any(_is_computed(ref) for ref in refs)
    if not stored or not all(_folds(one.factor / common, first.lora.up.spec.dtype) for one in products):
        common = 1.0
    factors = tuple(one.factor / common for one in products)
    dtypes = (first.lora.up.spec.dtype, first.lora.down.spec.dtype)
    if exact and not stored:
        dtypes = (_wide(refs), _wide(refs))
    elif exact and not all(_folds(factor, dtypes[0]) for factor in factors):
        dtypes = (_wide(refs), dtypes[1])
    ups, downs = (tuple(getattr(one.lora, name) for one in products) for name in ("up", "down"))
    tail = (1,) * (len(inner) - 1)
    up, down = ups[0], downs[0]
    if len(products) > 1 or factors != (1.0,) or up.spec.dtype is not dtypes[0] or len(up.shape) != len(inner) + 1:
        up = Computed(partial(_beside, factors=factors), ups, Spec((first.lora.height, rank, *tail), dtypes[0]))
    if len(products) > 1 or down.spec.dtype is not dtypes[1] or down.shape[1:] != inner:
        down = Computed(_below, downs, Spec((rank, *inner), dtypes[1]))
    return LoRA(up=up, down=down, alpha=common * rank, reshape=first.lora.reshape)


def _folds(factor: float, dtype: DType) -> bool:
    """Whether a type holds every product with a factor: signs, and powers of two where the exponent has room."""
    return abs(factor) == 1 or (dtype is not DType.F16 and math.frexp(factor)[0] in (0.5, -0.5))


def _is_computed(ref: Ref) -> bool:
    return isinstance(ref, Computed) or any(_is_computed(part) for part in ref.parts)


def _wide(refs: Sequence[Ref]) -> DType:
    return DType.F64 if any(ref.spec.dtype is DType.F64 for ref in refs) else DType.F32


def _beside(*values: Tensor, factors: tuple[float, ...]) -> Tensor:
    return torch.cat([one.flatten(1) * factor for one, factor in zip(values, factors, strict=True)], 1)


def _below(*values: Tensor) -> Tensor:
    return torch.cat([one.flatten(1) for one in values])


def _whole(products: Sequence[Product], *, exact: bool) -> LoRA:
    """Return the sum as a matrix times the identity, on the smaller side."""
    first, inner = products[0].lora, inner_of(products)
    rows, columns = first.height, math.prod(inner)
    rank = min(rows, columns)
    refs = tuple(ref for one in products for ref in (one.lora.up, one.lora.down))
    dtype = _wide(refs) if exact else first.up.spec.dtype
    factors = tuple(one.factor for one in products)
    summed = partial(_product_sum, factors=factors)
    shapes = ((rows, rank, *(1,) * (len(inner) - 1)), (rank, *inner))
    eye = torch.eye(rank)
    if rows <= columns:
        up, down = Held(eye, Spec(shapes[0], dtype)), Computed(summed, refs, Spec(shapes[1], dtype))
        return LoRA(up=up, down=down, alpha=float(rank), reshape=first.reshape)
    return LoRA(
        up=Computed(summed, refs, Spec(shapes[0], dtype)),
        down=Held(eye, Spec(shapes[1], dtype)),
        alpha=float(rank),
        reshape=first.reshape,
    )


def _product_sum(*values: Tensor, factors: tuple[float, ...]) -> Tensor:
    return _beside(*values[::2], factors=factors) @ _below(*values[1::2])


def differences(path: str, terms: Sequence[Term], *, exact: bool) -> Full | Norm:
    """Return the sum of a module's terms as one difference, biases included."""
    shown = [term.record for term in terms if isinstance(term.record, Norm | Full) and term.record.weight is not None]
    shape = None if not shown else dict(shown[0].refs)["weight"].shape
    parts = []
    for term in terms:
        full = as_full(path, term.record, None, shape if not isinstance(term.record, Norm | Full) else None)
        if full.weight is not None:
            parts.append((full.weight, term.strength))
    bias = biases(path, terms, exact=exact)
    weight = summed(path, parts, exact=exact) if parts else None
    if isinstance(terms[0].record, Norm):
        assert weight is not None, "a norm has a weight"
        return Norm(weight=weight, bias=bias)
    return Full(weight=weight, bias=bias)


def biases(path: str, terms: Sequence[Term], *, exact: bool) -> Ref | None:
    """Return the sum of what a module's terms add to its bias."""
    parts = [(term.record.bias, term.strength) for term in terms if term.record.bias is not None]
    return summed(path, parts, exact=exact) if parts else None


def summed(path: str, parts: Sequence[tuple[Ref, float]], *, exact: bool) -> Ref:
    """Return Σ factor · tensor, in the shape and type of the first; in float32 where `exact` and that type would round.

    Raises:
        MismatchError: they have different numbers of elements.
    """
    first = parts[0][0]
    if any(ref.spec.numel != first.spec.numel for ref, _ in parts):
        raise MismatchError(f"{path}: the adapters' differences have different sizes (expected adapters for one model)")
    if len(parts) == 1 and parts[0][1] == 1:
        return first
    refs, factors = tuple(ref for ref, _ in parts), tuple(factor for _, factor in parts)
    rounds = len(parts) > 1 or not _folds(factors[0], first.spec.dtype)
    dtype = _wide(refs) if exact and rounds else first.spec.dtype
    return Computed(partial(_sum, factors=factors, shape=first.shape), refs, Spec(first.shape, dtype))


def _sum(*values: Tensor, factors: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    total = values[0].reshape(shape) * factors[0]
    for one, factor in zip(values[1:], factors[1:], strict=True):
        total = total + one.reshape(shape) * factor
    return total
