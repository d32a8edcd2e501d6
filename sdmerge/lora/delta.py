"""What a record changes in a weight: W' - W, for every algorithm.

Formulas: the papers of LoRA (Hu 2021), LoHa and LoKr (Yeh 2023, LyCORIS), (IA)3 (Liu 2022), GLoRA (Chavan 2023), OFT (Qiu
2023), BOFT (Liu 2023) and DoRA (Liu 2024), as LyCORIS and PEFT carry them out; where these differ, the record tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdformats.adapters.records import IA3, OFT, Full, GLoRA, InputMap, InputOFT, LoHa, LoKr, LoRA, Norm, Rows
from sdmerge.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sdformats.adapters.record import Magnitude, Record
    from sdformats.views import Ref

    Get = Callable[[Ref], Tensor]
    """Returns a tensor's numbers, in float32 or float64."""


def needs_weight(record: Record) -> bool:
    """Whether the change depends on the weight."""
    of = record.of if isinstance(record, Rows) else record
    replaces = isinstance(of, Full) and of.replaces
    return replaces or of.magnitude is not None or isinstance(of, IA3 | InputMap | GLoRA | OFT | InputOFT)


def delta(record: Record, get: Get, weight: Tensor | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return what a record adds to a weight, its scale included.

    Args:
        record: what is trained.
        get: returns a tensor's numbers.
        weight: what it is trained on, where `needs_weight`; (out, in[, kh, kw]).
        shape: the weight's shape, where there is no weight; None: as the factors make it.

    Returns:
        The change, of the weight's shape.

    Raises:
        MismatchError: the change has another size.
    """
    if weight is not None:
        shape = tuple(weight.shape)
    if isinstance(record, Rows):
        made = _rows(record, get, weight)
    elif needs_weight(record):
        if weight is None:
            raise MismatchError(
                f"the change by {record.algorithm} depends on the weight (expected the model, with --base)"
            )
        made = _plain(record, get, weight) if record.magnitude is None else _dora(record, record.magnitude, get, weight)
    else:
        made = _plain(record, get, None)
    if shape is None or tuple(made.shape) == shape:
        return made
    if made.numel() != torch.Size(shape).numel() or made.shape[0] != shape[0]:
        raise MismatchError(f"the change has the shape {list(made.shape)} (expected {list(shape)}, as the weight)")
    return made.reshape(shape)


def _rows(record: Rows, get: Get, weight: Tensor | None) -> Tensor:
    if weight is not None and needs_weight(record):
        raise MismatchError(f"rows of a fused module's {record.of.algorithm} need the fused weight")
    whole = delta(record.of, get)
    return torch.cat([whole[start:stop] for start, stop in record.ranges])


def _dora(record: Record, magnitude: Magnitude, get: Get, weight: Tensor) -> Tensor:
    """Give W + s Δ the trained lengths: of rows, or of columns (over all rows and the kernel)."""
    merged = weight + _plain(record, get, weight).reshape(weight.shape)
    over = [axis for axis in range(weight.dim()) if axis != (0 if magnitude.axis == "out" else 1)]
    lengths = torch.linalg.vector_norm(merged, dim=over, keepdim=True)
    target = get(magnitude.values).reshape(lengths.shape)
    # A row of zeros has no direction to give a length to; it stays.
    factor = torch.where(lengths > 0, target / lengths, torch.ones_like(lengths))
    return merged * factor - weight


def _plain(record: Record, get: Get, weight: Tensor | None) -> Tensor:
    """Return s Δ without DoRA's lengths."""
    match record:
        case LoRA():
            made = _lora(record, get)
        case LoHa():
            made = _hadamard(get(record.w1_a), get(record.w1_b), record.t1, get)
            made = made * _hadamard(get(record.w2_a), get(record.w2_b), record.t2, get)
        case LoKr():
            made = _kronecker(record, get)
        case Norm() | Full():
            made = _whole(record, get, weight)
        case _:
            assert weight is not None, "asked for by needs_weight"
            made = _of_weight(record, get, weight)
    return made * record.scale


def _lora(record: LoRA, get: Get) -> Tensor:
    up, down = get(record.up).flatten(1), get(record.down)
    if record.mid is not None:
        return torch.einsum("om,mnhw,ni->oihw", up, get(record.mid), down.flatten(1))
    return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _hadamard(a: Tensor, b: Tensor, t: Ref | None, get: Get) -> Tensor:
    if t is not None:
        return torch.einsum("ijhw,io,jc->ochw", get(t), a, b)
    return a.flatten(1) @ b.flatten(1)


def _kronecker(record: LoKr, get: Get) -> Tensor:
    """Flatten kernels: the product over a flattened convolution is the same matrix in old files and new."""
    first, second = factors(record, get)
    made = kronecker(first, second.flatten(1))
    return made if second.dim() == 2 else made.reshape(made.shape[0], -1, *second.shape[2:])


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Return first ⊗ second of two matrices, (m, n) and (p, q): (m · p, n · q).

    torch.kron refuses views of one row or column whose strides are odd, whatever `contiguous` says of them.
    """
    made = first[:, None, :, None] * second[None, :, None, :]
    return made.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])


def factors(record: LoKr, get: Get) -> tuple[Tensor, Tensor]:
    """Return the two factors of a Kronecker product: (o1, i1), and (o2, i2) or (o2, i2, kh, kw)."""
    first = get(record.w1) if record.w1 is not None else _product(record.w1_a, record.w1_b, get)
    if record.w2 is not None:
        return first, get(record.w2)
    if record.t2 is None:
        return first, _product(record.w2_a, record.w2_b, get)
    assert record.w2_a is not None, "assembled with both factors"
    assert record.w2_b is not None, "assembled with both factors"
    return first, torch.einsum("ijhw,io,jc->ochw", get(record.t2), get(record.w2_a), get(record.w2_b))


def _product(a: Ref | None, b: Ref | None, get: Get) -> Tensor:
    assert a is not None, "assembled with both factors"
    assert b is not None, "assembled with both factors"
    return get(a).flatten(1) @ get(b).flatten(1)


def _whole(record: Norm | Full, get: Get, weight: Tensor | None) -> Tensor:
    if record.weight is None:
        raise MismatchError("changes a bias alone, and no weight")
    made = get(record.weight)
    if isinstance(record, Full) and record.replaces:
        assert weight is not None, "asked for by needs_weight"
        return made.reshape(weight.shape) - weight
    return made


def _of_weight(record: Record, get: Get, weight: Tensor) -> Tensor:
    """Return changes that the weight is a part of."""
    match record:
        case IA3():
            factor = get(record.weight).reshape(-1)
            axis = 1 if record.on_input else 0
            return weight * factor.reshape([-1 if i == axis else 1 for i in range(weight.dim())])
        case InputMap():
            return weight @ get(record.matrix)
        case GLoRA():
            return _glora(record, get, weight)
        case OFT():
            return _rotated(record, get, weight) - weight
        case InputOFT():
            return _rotated_columns(record, get, weight) - weight
        case _:
            raise AssertionError(record.algorithm)


def _glora(record: GLoRA, get: Get, weight: Tensor) -> Tensor:
    names = (record.a2, record.a1, record.b2, record.b1) if record.old else (record.a1, record.a2, record.b1, record.b2)
    a1, a2, b1, b2 = (get(ref) for ref in names)
    inputs = a1.flatten(1) @ a2.flatten(1)
    added = torch.einsum("oi...,ij->oj...", weight, inputs)
    if record.bm is not None:
        return added + torch.einsum("om,mnhw,ni->oihw", b1.flatten(1), get(record.bm), b2.flatten(1))
    return added + (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape)


def _rotated(record: OFT, get: Get, weight: Tensor) -> Tensor:
    """Rotate groups of rows: one after the other along the diagonal, or in the stages of a butterfly."""
    blocks = get(record.blocks).to(weight.dtype)
    turns = blocks if record.rotations else _cayley(blocks, record.constraint, weight.shape[0])
    size = blocks.shape[-1]
    if blocks.dim() == 4:
        turned = weight.flatten(1)
        for stage, turn in enumerate(turns):
            apart = 2**stage * (size // 2)
            grouped = turned.reshape(-1, 2, apart, turned.shape[1]).transpose(1, 2).reshape(-1, size, turned.shape[1])
            grouped = torch.einsum("bij,bjc->bic", turn, grouped)
            turned = grouped.reshape(-1, apart, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
    else:
        turned = torch.einsum("knm,knc->kmc", turns, weight.reshape(-1, size, weight[0].numel()))
    turned = turned.reshape(weight.shape)
    if record.rescale is None:
        return turned
    return turned * get(record.rescale).reshape(-1, *(1,) * (weight.dim() - 1))


def _cayley(blocks: Tensor, constraint: float | None, rows: int) -> Tensor:
    """Return (I + Q) (I - Q)⁻¹ of Q = B - Bᵀ, shortened to the constraint."""
    skew = blocks - blocks.transpose(-1, -2)
    if constraint is not None and constraint > 0:
        length = torch.linalg.vector_norm(skew)
        bound = constraint * rows
        skew = torch.where(length > bound, skew * (bound / length.clamp(min=torch.finfo(skew.dtype).tiny)), skew)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turns: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return turns


def _rotated_columns(record: InputOFT, get: Get, weight: Tensor) -> Tensor:
    """Rotate groups of columns, as PEFT does: by Cayley's transform, or by some terms of its series."""
    vectors = get(record.vectors).to(weight.dtype)
    size = record.size
    upper = torch.triu_indices(size, size, 1)
    skew = torch.zeros(vectors.shape[0], size, size, dtype=vectors.dtype, device=vectors.device)
    skew[:, upper[0], upper[1]] = vectors
    skew = skew - skew.transpose(1, 2)
    turns = _series(skew, record.terms)
    flat = weight.flatten(1)
    groups = flat.shape[1] // size
    turns = turns.expand(groups, size, size)  # one rotation may be shared by all groups
    grouped = flat.reshape(flat.shape[0], groups, size)
    return torch.einsum("okj,kij->oki", grouped, turns).reshape(weight.shape)


def _series(skew: Tensor, terms: int | None) -> Tensor:
    """Return (I - Q) (I + Q)⁻¹, or I + 2Q + 2Q² + … as PEFT cuts it: its last power counts once, and 3 terms are 4."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms is None:
        turns: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
        return turns
    last = terms - 1 if terms < 3 else max(terms - 1, 3)
    total, power = eye, eye
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + power * (1 if 1 < exponent == last else 2)
    return total
