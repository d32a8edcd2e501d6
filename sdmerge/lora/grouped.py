"""Baking by the kernels that go over tables of layers: which parts a tensor's contributions are, and their launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sdformats.adapters.records import LoHa, LoKr, LoRA
from sdkernels import cast, dora, hadamard, kron, lowrank
from sdkernels.table import Layer
from sdmerge.lora.algebra import as_lora
from sdmerge.lora.bake import in_rows
from sdmerge.lora.delta import factors
from sdmerge.lora.refs import Cast, Computed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sdformats.views import Ref
    from sdkernels.philox import Key
    from sdmerge.lora.bake import Baked
    from sdmerge.lora.contributions import Contribution

    Get = Callable[[Ref], Tensor]

_KERNELS = (lowrank.bake, hadamard.bake, kron.bake, dora.bake)
"""In the order in which a tensor passes through them; all but the last that it passes write float32."""


class Baking(NamedTuple):
    """One tensor to bake.

    Attributes:
        weight: as stored, contiguous.
        out: where to round the result to, of its shape, contiguous.
        parts: for each of the kernels, what it adds.
        key: random numbers to round by; None rounds to nearest.
    """

    weight: Tensor
    out: Tensor
    parts: tuple[tuple[Any, ...], ...]
    key: Key | None = None


def parts_of(baked: Baked, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...] | None:
    """Return what each kernel adds to a tensor; None where some contribution is for none of them.

    Args:
        baked: the expression.
        tensors: the step's reads, as stored.
    """
    weight = tensors[baked.index]
    read = {stored: tensors[index] for stored, index in baked.stored}
    wide = cast.accumulator(weight.dtype)

    def get(ref: Ref) -> Tensor:
        """Factors that are views of what is stored are multiplied as they are; what takes arithmetic is widened first."""
        exact = _is_view(ref)
        found = torch.as_tensor(ref.evaluate(lambda one: read[one] if exact else read[one].to(wide), torch))
        return found if found.device == weight.device else found.to(weight.device)

    found: tuple[list[Any], ...] = ([], [], [], [])
    for one in baked.added:
        record, strength = one.record, one.strength
        if one.thin:
            found[0].append(_product(one, get, strength))
        elif in_rows(one) and isinstance(record, LoHa):
            a1, b1, a2, b2 = (get(ref).flatten(1) for ref in (record.w1_a, record.w1_b, record.w2_a, record.w2_b))
            found[1].append(hadamard.Hadamard(a1, b1, a2, b2, record.scale * strength, one.rows[0]))
        elif in_rows(one) and isinstance(record, LoKr):
            w1, w2 = factors(record, lambda ref: get(ref).to(wide))
            found[2].append(kron.Kronecker(w1, w2.flatten(1), record.scale * strength, one.rows[0]))
        elif _has_lengths(one, weight) and len(baked.added) == 1:
            assert record.magnitude is not None, "asked for"
            values = get(record.magnitude.values).float().reshape(-1)
            found[3].append(dora.Lengths(_product(one, get, 1.0), values, strength, record.magnitude.axis != "out"))
        else:
            return None
    return tuple(map(tuple, found))


def _is_view(ref: Ref) -> bool:
    return not isinstance(ref, Computed | Cast) and all(map(_is_view, ref.parts))


def _product(one: Contribution, get: Get, strength: float) -> lowrank.Product:
    record = as_lora("", one.record)
    up, down = get(record.up).flatten(1), get(record.down).flatten(1)
    if one.transposed:
        return lowrank.Product(down.T, up.T, record.scale * strength)
    return lowrank.Product(up, down, record.scale * strength, one.rows[0])


def _has_lengths(one: Contribution, weight: Tensor) -> bool:
    record = one.record
    whole = not (one.transposed or one.bias) and one.rows == (0, weight.shape[0])
    return whole and isinstance(record, LoRA) and record.magnitude is not None


def bake(items: Sequence[Baking]) -> None:
    """Bake tensors of one device: a launch for each kernel and set of types, or a reference where there is no GPU."""
    last = [max((i for i, parts in enumerate(item.parts) if parts), default=0) for item in items]
    weights = [item.weight.reshape(item.weight.shape[0], -1) for item in items]
    for number, kernel in enumerate(_KERNELS):
        layers = []
        for i, item in enumerate(items):
            if not (item.parts[number] or number == last[i] == 0):
                continue
            ends = number == last[i]
            out = item.out.view(weights[i].shape) if ends else _wide_like(weights[i])
            layers.append(Layer(weights[i], out, item.parts[number], item.key if ends else None))
            weights[i] = out
        if layers:
            kernel(layers)


def _wide_like(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=cast.accumulator(weight.dtype), device=weight.device)
