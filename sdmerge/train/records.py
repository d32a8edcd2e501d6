"""Untrained records: for each algorithm the factors that training starts from. None of them changes the weight yet.

Starting values are those of the algorithms' own programs: PEFT for LoRA and DoRA, LyCORIS for the others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import init

from sdformats.adapters.record import Magnitude
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, LoHa, LoKr, LoRA
from sdformats.tensor import DType, Spec
from sdmerge.errors import RequestError
from sdmerge.lora.held import Held

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sdformats.adapters.record import Record

    Make = Callable[["Plan"], Record]


class Plan:
    """What a record is made for.

    Args:
        weight: the layer's, (out, in) or (out, in, kh, kw).
        rank: of the factors; smaller where the layer is.
        alpha: the change is multiplied with alpha / rank.
        factor: LoKr's smaller factor has this many rows and columns at most; 0: as near to a square root as divides.
        dtype: what the tensors will be written in.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, factor: int = 0, dtype: DType = DType.F32) -> None:
        self.weight, self.factor, self.dtype = weight.detach(), factor, dtype
        self.rows, self.inner = weight.shape[0], tuple(weight.shape[1:])
        self.columns = math.prod(self.inner)
        self.rank = min(rank, self.rows, self.columns)
        self.alpha = alpha * self.rank / rank
        self.ones = (1,) * (len(self.inner) - 1)

    def held(self, values: Tensor) -> Held:
        """Return a tensor as a field of a record."""
        return Held(values, Spec(tuple(values.shape), self.dtype))

    def zeros(self, *shape: int) -> Held:
        """Return zeros."""
        return self.held(torch.zeros(shape))

    def normal(self, std: float, *shape: int) -> Held:
        """Return normally distributed numbers."""
        return self.held(torch.randn(shape) * std)

    def uniform(self, *shape: int) -> Held:
        """Return what torch starts a linear layer with."""
        return self.held(init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def _lora(plan: Plan) -> LoRA:
    down = plan.uniform(plan.rank, *plan.inner)
    return LoRA(up=plan.zeros(plan.rows, plan.rank, *plan.ones), down=down, alpha=plan.alpha)


def _dora(plan: Plan) -> LoRA:
    lengths = torch.linalg.vector_norm(plan.weight.float().flatten(1), dim=1)
    plain = _lora(plan)
    values = plan.held(lengths.reshape(plan.rows, *(1,) * len(plan.inner)))
    return LoRA(up=plain.up, down=plain.down, alpha=plain.alpha, magnitude=Magnitude(values, "out"))


def _loha(plan: Plan) -> LoHa:
    return LoHa(
        w1_a=plan.normal(0.1, plan.rows, plan.rank),
        w1_b=plan.normal(1.0, plan.rank, plan.columns),
        w2_a=plan.zeros(plan.rows, plan.rank),
        w2_b=plan.normal(1.0, plan.rank, plan.columns),
        alpha=plan.alpha,
    )


def _lokr(plan: Plan) -> LoKr:
    """Take w1 whole; w2 whole too where a product of rank r would be no smaller."""
    (o1, o2), (i1, i2) = _divided(plan.rows, plan.factor), _divided(plan.inner[0], plan.factor)
    kernel = plan.inner[1:]
    first = plan.uniform(o1, i1)
    if 2 * plan.rank >= max(o2, i2):
        return LoKr(w1=first, w2=plan.zeros(o2, i2, *kernel))
    rank, alpha = plan.rank, plan.alpha
    w2_a, w2_b = plan.uniform(o2, rank), plan.zeros(rank, i2 * math.prod(kernel))
    return LoKr(w1=first, w2_a=w2_a, w2_b=w2_b, alpha=alpha)


def _divided(size: int, factor: int) -> tuple[int, int]:
    """Return the two divisors of a size, the smaller one first: the largest that is no larger than asked for."""
    most = min(factor or math.isqrt(size), math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def _glora(plan: Plan) -> GLoRA:
    inputs, rank = plan.inner[0], plan.rank
    return GLoRA(
        a1=plan.uniform(inputs, rank, *plan.ones),
        a2=plan.zeros(rank, inputs, *plan.ones),
        b1=plan.zeros(plan.rows, rank, *plan.ones),
        b2=plan.uniform(rank, *plan.inner),
        alpha=plan.alpha,
    )


def _ia3(plan: Plan) -> IA3:
    return IA3(weight=plan.zeros(plan.rows, 1), on_input=False)


def _oft(plan: Plan) -> OFT:
    """Rotate groups of rows: as many rows in a group as the rank says, or the next divisor below."""
    size = next(n for n in range(min(plan.rank, plan.rows), 0, -1) if plan.rows % n == 0)
    return OFT(blocks=plan.zeros(plan.rows // size, size, size))


def _full(plan: Plan) -> Full:
    return Full(weight=plan.zeros(plan.rows, *plan.inner))


ALGORITHMS: dict[str, Make] = {
    "lora": _lora,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "ia3": _ia3,
    "oft": _oft,
    "full": _full,
}
"""How a layer's record begins, by algorithm."""


def untrained(algorithm: str, plan: Plan) -> Record:
    """Return a record that does not change the layer yet.

    Raises:
        RequestError: there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise RequestError(f"algo is {algorithm!r} (expected one of {', '.join(ALGORITHMS)})")
    return ALGORITHMS[algorithm](plan)
