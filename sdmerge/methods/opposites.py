"""Variants of add difference that weigh every element by how far the two changes A − C and B − C oppose each other."""

import math
from typing import TYPE_CHECKING, Annotated

from sdmerge.method import Param, method
from sdmerge.methods._parameters import Learned
from sdmerge.methods._shared import wide

if TYPE_CHECKING:
    from torch import Tensor


@method(mixed=True, propagates=True)
def add_opposite(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
) -> "Tensor":
    """Add difference where A and B disagree: fully where only B changed, twice where they are opposite, not where equal.

    The weight is written by sd-mecha as 2 |A − B| / (|A − B| + |A + B − 2C|), which is the same. Exactly A where B equals A
    or C, or α is 0.

    Formula: A + α (B − C) · |A − B| / max(|A − C|, |B − C|), 0 for 0 / 0
    Source: sd-mecha (add_opposite_mask)

    Args:
        a, b: tensors of one shape.
        c: of the same shape; the model that both were made from.
        alpha: 1 adds all of it, 0 none; other values extrapolate.
    """
    import torch

    wide_a, _, added, larger = _changes(a, b, c)
    weight = torch.where(larger == 0, 0.0, (wide_a - b.to(wide_a.dtype)).abs_() / larger)
    return wide_a.add(added.mul_(weight), alpha=alpha)


@method(mixed=True, propagates=True)
def add_strict_opposite(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
) -> "Tensor":
    """Add difference only where A and B changed in opposite directions: up to twice, where they changed equally far.

    Exactly A where either equals C, where both changed in the same direction, or where α is 0.

    Formula: A + 2 α (B − C) · max(0, −(A − C)(B − C) / max(|A − C|, |B − C|)²), 0 for 0 / 0
    Source: sd-mecha (add_strict_opposite_mask)

    Args:
        a, b: tensors of one shape.
        c: of the same shape; the model that both were made from.
        alpha: 1 adds all of it, 0 none; other values extrapolate.
    """
    import torch

    wide_a, own, added, larger = _changes(a, b, c)
    # Divided before they are multiplied: squares of small changes vanish in float32.
    against = (own / larger).mul_(added / larger).neg_().clamp_(min=0)
    weight = torch.where(larger == 0, 0.0, against)
    return wide_a.add(added.mul_(weight), alpha=2 * alpha)


@method(mixed=True)
def multiply_quotient(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("how much of B's change, as a factor, is applied to A", weight=True)] = 1.0,
) -> "Tensor":
    """Multiply A by a power of B / C where the magnitudes of A and B changed in opposite directions.

    Add difference in logarithms, as strict about opposites as add_strict_opposite: with α from 0 to 1 the magnitude lies
    between A's and C's. A power of a negative number is complex; its real part is taken. Exactly A where either equals C or
    where A, B or C is 0. In float64, because logarithms of nearly equal models cancel: in float32, as sd-mecha may have it,
    the exponent can be off by a tenth of a percent.

    Formula: Re(A · (B / C)^e), e = α · max(0, −p q / max(|p|, |q|)²), p = ln |A / C|, q = ln |B / C|
    Source: sd-mecha (multiply_quotient)

    Args:
        a, b: tensors of one shape.
        c: of the same shape; the model that both were made from.
        alpha: 0 gives A.
    """
    import torch

    dtype = wide(a, b, c)
    wide_a, wide_b, wide_c = a.double(), b.double(), c.double()
    origin = wide_c.abs().log_()
    own, ratio = wide_a.abs().log_().sub_(origin), wide_b.abs().log_().sub_(origin)
    larger = torch.maximum(own.abs(), ratio.abs())
    exponent = (own / larger).mul_(ratio / larger).neg_().clamp_(min=0).mul_(alpha)
    exponent = torch.where((larger > 0) & larger.isfinite(), exponent, 0.0)
    factor = ratio.where(exponent != 0, 0.0).mul_(exponent).exp_()
    turned = torch.signbit(wide_b) != torch.signbit(wide_c)
    factor = torch.where(turned, factor * exponent.mul_(math.pi).cos_(), factor)
    return factor.mul_(wide_a).to(dtype)


def _changes(a: "Tensor", b: "Tensor", c: "Tensor") -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Return A, A − C, B − C and the larger magnitude of the two changes, in the accumulator's type."""
    import torch

    dtype = wide(a, b, c)
    wide_a, wide_c = a.to(dtype), c.to(dtype)
    own, added = wide_a - wide_c, b.to(dtype) - wide_c
    return wide_a, own, added, torch.maximum(own.abs(), added.abs())
