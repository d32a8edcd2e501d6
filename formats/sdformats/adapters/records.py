"""What is trained for one module, by algorithm: factors, scale, DoRA's lengths. Records, no arithmetic.

A matrix is (out, in), a convolution (out, in, kh, kw); s is alpha / rank.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.adapters.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sdformats.views import Ref


@dataclass(frozen=True, kw_only=True)
class LoRA(Record):
    """ΔW = s up · down, kernels flattened; with `mid` Tucker's form: Σ up[o,m] mid[m,n,…] down[n,i].

    Attributes:
        up: (out, rank), or (out, rank, 1, 1).
        down: (rank, in), or (rank, in, kh, kw); (rank, in, 1, 1) beside a mid.
        mid: (rank, rank, kh, kw).
        reshape: the shape that the weight is enlarged to before, for layers that get more inputs.
    """

    algorithm = "lora"
    up: Ref
    down: Ref
    mid: Ref | None = None
    reshape: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.down.shape[1:])

    @property
    def height(self) -> int:
        return self.up.shape[0]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {"up": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class LoHa(Record):
    """ΔW = s (w1_a w1_b) ⊙ (w2_a w2_b); with t1 and t2 the factors are Σ t[i,j,…] a[i,o] b[j,c].

    Attributes:
        w1_a, w2_a: (out, rank); (rank, out) beside t1 and t2.
        w1_b, w2_b: (rank, in · kh · kw); (rank, in) beside t1 and t2.
        t1, t2: (rank, rank, kh, kw).
    """

    algorithm = "loha"
    w1_a: Ref
    w1_b: Ref
    w2_a: Ref
    w2_b: Ref
    t1: Ref | None = None
    t2: Ref | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.w1_b.shape[1:])

    @property
    def height(self) -> int:
        return self.w1_a.shape[0 if self.t1 is None else 1]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        axis = 0 if self.t1 is None else 1
        return {"w1_a": (axis, 1), "w2_a": (axis, 1)}


@dataclass(frozen=True, kw_only=True)
class LoKr(Record):
    """ΔW = s w1 ⊗ w2, each whole or as a product; with t2, w2 is Σ t2[i,j,…] w2_a[i,o] w2_b[j,c].

    Old files take the product over a convolution's flattened matrix, so their w2 is a matrix whose columns do not divide as
    the kernel does: only the base's shape tells. Where both factors are whole there is no rank: s is alpha itself, and
    layouts that ignore it there read None.

    Attributes:
        w1, w1_a, w1_b: (o1, i1), or (o1, rank) and (rank, i1).
        w2, w2_a, w2_b: (o2, i2[, kh, kw]), or (o2, rank) and (rank, i2 · kh · kw); w2_a (rank, o2) beside t2.
        t2: (rank, rank, kh, kw).
    """

    algorithm = "lokr"
    w1: Ref | None = None
    w1_a: Ref | None = None
    w1_b: Ref | None = None
    w2: Ref | None = None
    w2_a: Ref | None = None
    w2_b: Ref | None = None
    t2: Ref | None = None

    @property
    def whole(self) -> bool:
        """Whether both factors are whole."""
        return self.w1 is not None and self.w2 is not None

    @property
    def rank(self) -> int:
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return 1 if factor is None else factor.shape[0]

    @property
    def columns(self) -> int:
        first = self.w1 if self.w1 is not None else self.w1_b
        second = self.w2 if self.w2 is not None else self.w2_b
        assert first is not None, "assembled with a first factor"
        assert second is not None, "assembled with a second factor"
        return first.shape[1] * math.prod(second.shape[1:])

    @property
    def height(self) -> int:
        first = self.w1 if self.w1 is not None else self.w1_a
        assert first is not None, "assembled with a first factor"
        return first.shape[0] * self.unit

    @property
    def unit(self) -> int:
        """How many rows the second factor has."""
        second = self.w2 if self.w2 is not None else self.w2_a
        assert second is not None, "assembled with a second factor"
        return second.shape[0 if self.w2 is not None or self.t2 is None else 1]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {"w1" if self.w1 is not None else "w1_a": (0, self.unit)}


@dataclass(frozen=True, kw_only=True)
class IA3(Record):
    """W' = W + W · weight, over columns (`on_input`) or rows.

    Attributes:
        weight: (1, in) or (in,); (out, 1) or (out,) over rows.
    """

    algorithm = "ia3"
    weight: Ref
    on_input: bool

    @property
    def columns(self) -> int | None:
        return self.weight.spec.numel if self.on_input else None

    @property
    def height(self) -> int | None:
        return None if self.on_input else self.weight.spec.numel

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {} if self.on_input else {"weight": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class InputMap(Record):
    """ΔW = W · matrix: a module whose inputs go through x + matrix · x.

    Attributes:
        matrix: (in, in).
    """

    algorithm = "input-map"
    matrix: Ref

    @property
    def columns(self) -> int:
        return self.matrix.shape[0]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class GLoRA(Record):
    """ΔW = s (W a1 a2 + b1 b2); in old files s (W a2 a1 + b2 b1).

    Attributes:
        a1, a2: (in, rank) and (rank, in); the other way round in old files.
        b1, b2: (out, rank) and (rank, in); the other way round in old files.
        old: which of them.
        bm: (rank, rank, kh, kw) between b1 and b2, for Tucker's form.
    """

    algorithm = "glora"
    a1: Ref
    a2: Ref
    b1: Ref
    b2: Ref
    old: bool = False
    bm: Ref | None = None

    @property
    def rank(self) -> int:
        return (self.a1 if self.old else self.a2).shape[0]

    @property
    def columns(self) -> int:
        return math.prod((self.a1 if self.old else self.a2).shape[1:])

    @property
    def height(self) -> int:
        return (self.b2 if self.old else self.b1).shape[0]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {"b2" if self.old else "b1": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class OFT(Record):
    """Rotations of groups of rows.

    Attributes:
        blocks: (n, b, b) skew parts of a Cayley transform, or the rotations themselves where `rotations`; (m, n, b, b) for
            a butterfly (BOFT), whose m factors follow each other.
        rescale: (out, 1[, 1, 1]), what rows are multiplied with after.
        constraint: the largest ‖Q‖ is constraint · out; None for no bound.
        rotations: whether `blocks` are rotations already.
    """

    algorithm = "oft"
    blocks: Ref
    rescale: Ref | None = None
    constraint: float | None = None
    rotations: bool = False

    @property
    def height(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]


@dataclass(frozen=True, kw_only=True)
class InputOFT(Record):
    """PEFT's OFT: rotations of groups of columns, by Cayley's transform or some terms of its series.

    Attributes:
        vectors: (n, b (b - 1) / 2) upper triangles of skew matrices.
        terms: how many terms of the series are meant; None for the transform itself.
    """

    algorithm = "peft-oft"
    vectors: Ref
    terms: int | None = 5

    @property
    def size(self) -> int:
        """How many columns each rotation turns."""
        return (1 + math.isqrt(1 + 8 * self.vectors.shape[1])) // 2


@dataclass(frozen=True, kw_only=True)
class Full(Record):
    """ΔW itself, or a new weight in place of the old one.

    Attributes:
        weight: of the weight's shape; None where only the bias changes.
        replaces: whether it is the new weight.
        new_bias: whether `bias` is the new one, too.
    """

    algorithm = "full"
    weight: Ref | None = None
    replaces: bool = False
    new_bias: bool = False

    @property
    def columns(self) -> int | None:
        return math.prod(self.weight.shape[1:]) if self.weight is not None and len(self.weight.shape) > 1 else None

    @property
    def height(self) -> int | None:
        return super().height if self.weight is None else self.weight.shape[0]

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {} if self.weight is None else {"weight": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Norm(Record):
    """What is added to a norm's weight (and, as `bias`, to its bias).

    Attributes:
        weight: (channels,).
    """

    algorithm = "norm"
    weight: Ref

    @property
    def height(self) -> int:
        return self.weight.spec.numel

    @property
    def row_fields(self) -> Mapping[str, tuple[int, int]]:
        return {"weight": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Rows(Record):
    """Some rows of what another record makes, where its factors cannot be cut: a Kronecker product across borders, rotations.

    Attributes:
        of: the record of a fused module.
        ranges: which of its rows, one range after the other.
    """

    algorithm = "rows"
    of: Record
    ranges: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int | None:
        return self.of.rank

    @property
    def scale(self) -> float:
        return self.of.scale

    @property
    def columns(self) -> int | None:
        return self.of.columns

    @property
    def refs(self) -> Iterator[tuple[str, Ref]]:
        return self.of.refs

    def map(self, change: Callable[[Ref], Ref]) -> Record:
        return dataclasses.replace(self, of=self.of.map(change))

    @property
    def height(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def labels(record: Record) -> tuple[str, ...]:
    """Return what people call a record: its algorithm, more exactly, and ``dora`` where it has lengths."""
    if isinstance(record, Rows):
        return (*labels(record.of), "rows")
    name = record.algorithm
    if isinstance(record, LoRA):
        if record.mid is not None:
            name = "tucker"
        elif len(record.down.shape) == 4 and record.down.shape[2:] != (1, 1):
            name = "locon"
    elif isinstance(record, OFT) and len(record.blocks.shape) == 4:
        name = "boft"
    return (name, "dora") if record.magnitude is not None else (name,)
