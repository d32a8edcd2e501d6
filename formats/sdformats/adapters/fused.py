"""Modules that are one in some files and several in others: q, k and v, or a norm's shift and scale the other way round.

Only views and copies: what would need arithmetic is left to `fold`, which the caller brings.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.family import SD3_WIDTHS
from sdformats.adapters.records import IA3, Full, GLoRA, LoHa, LoKr, LoRA, Rows
from sdformats.errors import CorruptFile
from sdformats.rearranged import Blocks
from sdformats.views import Part, Ref, bits, first_rows, joined, rows, same

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sdformats.adapters.record import Record
    from sdformats.rule import Rule

    Fold = Callable[[Ref, float], Ref]
    """Returns a tensor times a number."""
    Range = tuple[int, int]


def cut(record: Record, ranges: tuple[Range, ...]) -> Record:
    """Return a record for some of the module's rows, one range after the other."""
    if isinstance(record, Rows):
        found = _composed(record.ranges, ranges)
        return record.of if found == ((0, record.of.height),) else replace(record, ranges=found)
    whole = record.height
    if ranges == ((0, whole),):
        return record
    fields = _row_fields(record, ranges)
    if fields is None or (record.magnitude is not None and record.magnitude.axis == "in"):
        return Rows(of=record, ranges=ranges)
    changed: dict[str, Any] = {}
    for name, (axis, unit) in fields.items():
        ref = getattr(record, name)
        changed[name] = joined([Part(ref, axis, start // unit, stop // unit) for start, stop in ranges], axis)
    if record.magnitude is not None:
        values = joined([rows(record.magnitude.values, *one) for one in ranges])
        changed["magnitude"] = replace(record.magnitude, values=values)
    if record.bias is not None:
        changed["bias"] = joined([rows(record.bias, *one) for one in ranges])
    return replace(record, **changed)


def _row_fields(record: Record, ranges: tuple[Range, ...]) -> Mapping[str, tuple[int, int]] | None:
    """Return which tensors carry the module's rows, where they can be cut at these borders."""
    fields = record.row_fields
    units = [] if fields is None else [unit for _, unit in fields.values()]
    return None if any(edge % unit for unit in units for one in ranges for edge in one) else fields


def _composed(outer: tuple[Range, ...], inner: tuple[Range, ...]) -> tuple[Range, ...]:
    """Return the ranges that are `inner` of what `outer` takes."""
    found: list[Range] = []
    edges = [0, *accumulate(stop - start for start, stop in outer)]
    for start, stop in inner:
        for (first, _), (left, right) in zip(outer, pairwise(edges), strict=True):
            low, high = max(start, left), min(stop, right)
            if low < high:
                one = (first + low - left, first + high - left)
                if found and found[-1][1] == one[0]:
                    one = (found.pop()[0], one[1])
                found.append(one)
    return tuple(found)


def is_swapped(record: Record, fusion: Rule) -> bool:
    """Whether the halves of a module's rows are the other way round in the file."""
    if not fusion.swapped_alone or record.height is None:
        return fusion.swapped
    widths = SD3_WIDTHS if record.columns is None else (record.columns,)
    return record.height in (2 * width for width in widths)


def _alike_in_rows(record: Record) -> bool:
    """Whether a record does the same to all rows, so that it is also that of any of them."""
    return record.height is None and record.row_fields == {} and record.magnitude is None


def swapped(record: Record) -> Record:
    """Return a record whose halves have changed places.

    Raises:
        CorruptFile: its rows have no halves, or are not known.
    """
    if _alike_in_rows(record):
        return record
    whole = record.height
    if whole is None or whole % 2:
        raise CorruptFile(f"has {whole} rows, which have no halves")
    return cut(record, ((whole // 2, whole), (0, whole // 2)))


def split(record: Record, fusion: Rule) -> dict[str, Record]:
    """Return the record of each part of a fused module.

    Parts that are wholly zero beside others that are not are no part of the adapter. A LoRA whose up is made of blocks
    along the diagonal gives each part its own down; else they share it.

    Raises:
        CorruptFile: the rows do not divide.
    """
    if is_swapped(record, fusion):
        record = swapped(record)
    if len(fusion.parts) == 1 or _alike_in_rows(record):
        return dict.fromkeys(fusion.parts, record)
    whole = record.height
    if whole is None:
        raise CorruptFile(f"is {record.algorithm} on a fused module, which does not tell its rows")
    unit, left = divmod(whole, sum(fusion.shares))
    if left:
        raise CorruptFile(f"has {whole} rows for parts of {':'.join(map(str, fusion.shares))}")
    edges = [0, *(unit * total for total in accumulate(fusion.shares))]
    ranges = list(pairwise(edges))
    own = _own_columns(record, ranges) if isinstance(record, LoRA) and record.mid is None else None
    found: dict[str, Record] = {}
    for index, (path, one) in enumerate(zip(fusion.parts, ranges, strict=True)):
        part = cut(record, (one,))
        if own is not None:
            if own[index] is None:
                continue
            part = _narrowed(part, own[index])
        found[path] = part
    return found


def _narrowed(part: Record, columns: Range | None) -> Record:
    """Return a LoRA with some of its ranks, at the same scale."""
    assert isinstance(part, LoRA), "only these are narrowed"
    assert columns is not None, "parts of zeros are left out before"
    if columns == (0, part.rank):
        return part
    alpha = None if part.alpha is None else part.alpha * (columns[1] - columns[0]) / part.rank
    return replace(part, up=Part(part.up, 1, *columns), down=rows(part.down, *columns), alpha=alpha)


def _own_columns(record: LoRA, ranges: Sequence[Range]) -> list[Range | None] | None:
    """Return the ranks that each part of the up alone uses (None: it is zero); None where they share some."""
    sample = [_used(first_rows(record.up, start, 1)) for start, stop in ranges if stop > start]
    if np.any(np.sum(sample, axis=0) > 1):
        return None
    values = bits(record.up)
    used = [_used(values[start:stop]) for start, stop in ranges]
    if np.any(np.sum(used, axis=0) > 1) or not np.any(used):
        return None
    rank, count = record.rank, len(ranges)
    equal = [(i * rank // count, (i + 1) * rank // count) for i in range(count)]
    if rank % count == 0 and all(not _outside(one, two) for one, two in zip(used, equal, strict=True)):
        return [two if one.any() else None for one, two in zip(used, equal, strict=True)]
    there = [index for index in range(count) if used[index].any()]
    firsts = [int(np.argmax(used[index])) for index in there]
    lasts = [rank - 1 - int(np.argmax(used[index][::-1])) for index in there]
    if any(last >= first for last, first in zip(lasts, firsts[1:], strict=False)):
        return None
    edges = [0, *firsts[1:], rank]
    found: list[Range | None] = [None] * count
    for index, one in zip(there, pairwise(edges), strict=True):
        found[index] = one
    return found


def _used(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return which columns hold anything but zeros (of either sign)."""
    return np.asarray(((values << 1) != 0).reshape(*values.shape[:2], -1).any(axis=(0, 2)))


def _outside(used: np.ndarray[Any, Any], inside: Range) -> bool:
    return bool(used[: inside[0]].any() or used[inside[1] :].any())


def fuse(module: str, records: Sequence[Record | None], fusion: Rule, fold: Fold) -> Record:
    """Return the record of a fused module; the inverse of `split`.

    Args:
        module: its name, for errors.
        records: of each part; None for one that does not change.
        fusion: what it is made of.
        fold: returns a tensor times a number.

    Raises:
        CannotHold: no single record of the algorithm is all of these.
    """
    there = [record for record in records if record is not None]
    one = len(fusion.parts) == 1
    record = there[0] if one else _whole_again(there, fusion) or _joined(module, records, fusion, fold)
    return swapped(record) if is_swapped(record, fusion) else record


def _whole_again(there: Sequence[Record], fusion: Rule) -> Record | None:
    """Return the record that all parts are rows of, where they are."""
    first = there[0]
    if not isinstance(first, Rows) or len(there) < len(fusion.parts):
        return None
    if not all(isinstance(record, Rows) and record.of == first.of for record in there):
        return None
    ranges = [one for record in there if isinstance(record, Rows) for one in record.ranges]
    in_order = ranges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ranges))
    return first.of if in_order and ranges[-1][1] == first.of.height else None


_SHARED = {
    LoHa: ("w1_b", "w2_b", "t1", "t2"),
    GLoRA: ("a1", "a2", "bm"),
    LoKr: ("w1_b", "w2", "w2_a", "w2_b", "t2"),
    Full: (),
    IA3: (),
}


def _joined(module: str, records: Sequence[Record | None], fusion: Rule, fold: Fold) -> Record:
    there = [record for record in records if record is not None]
    kinds = {type(record) for record in there}
    first = there[0]
    if len(kinds) > 1:
        raise CannotHold("its parts are of several algorithms", key=module, advice="make them one, with --as lora")
    _check_rows(module, records, fusion)
    if isinstance(first, LoRA):
        return _joined_lora(module, records, fusion, fold)
    shared = _SHARED.get(type(first))
    complete = len(there) == len(fusion.parts) and shared is not None
    if isinstance(first, GLoRA):
        shared = (*(shared or ()), "b1" if first.old else "b2")
    alike = complete and all(_alike(first, record, shared or ()) for record in there[1:])
    fields = first.row_fields if alike else None
    if fields is None:
        raise CannotHold(
            f"is one module of q, k and v there, which their {first.algorithm} factors cannot be joined to",
            key=module,
            advice="convert with --as lora",
        )
    changed: dict[str, Any] = {
        name: _stacked(module, [getattr(record, name) for record in there], axis) for name, (axis, _) in fields.items()
    }
    return replace(first, **changed, **_joined_sides(module, there))


def _check_rows(module: str, records: Sequence[Record | None], fusion: Rule) -> None:
    """Refuse parts whose rows are not shared as the module's are."""
    pairs = zip(records, fusion.shares, strict=True)
    known = [(record.height, share) for record, share in pairs if record is not None and record.height is not None]
    for (height, share), (other, other_share) in pairwise(known):
        if height * other_share != other * share:
            raise CannotHold(
                f"has parts of {height} and {other} rows", key=module, expected=f"rows as {share} to {other_share}"
            )


def _stacked(module: str, refs: Sequence[Ref], axis: int = 0) -> Ref:
    """Join tensors of one type that agree in every other axis."""
    for other in refs[1:]:
        _check_type(module, refs[0], other, (axis, axis + 1))
    return joined(refs, axis)


def _check_type(module: str, one: Ref, other: Ref, between: Range) -> None:
    """Refuse tensors of two types, or of shapes that differ outside of some axes."""
    if one.spec.dtype is not other.spec.dtype:
        raise CannotHold(
            f"has parts of the types {one.spec.dtype} and {other.spec.dtype}",
            key=module,
            advice="make them one with --dtype",
        )
    start, stop = between
    if (one.shape[:start], one.shape[stop:]) != (other.shape[:start], other.shape[stop:]):
        raise CannotHold(f"has parts that do not fit: {one.spec} and {other.spec}", key=module)


def _alike(one: Record, other: Record, shared: Sequence[str]) -> bool:
    if one.alpha != other.alpha or getattr(one, "old", None) != getattr(other, "old", None):
        return False
    if isinstance(one, IA3) and isinstance(other, IA3) and (one.on_input or other.on_input):
        return one.on_input == other.on_input and same(one.weight, other.weight)
    if isinstance(one, Full) and isinstance(other, Full):
        return one.replaces == other.replaces and (one.weight is None) == (other.weight is None)
    pairs = [(getattr(one, name), getattr(other, name)) for name in shared]
    return all((a is None) == (b is None) and (a is None or same(a, b)) for a, b in pairs)


def _joined_sides(module: str, there: Sequence[Record]) -> dict[str, Any]:
    """Join lengths and biases, which all parts have or none."""
    sides: dict[str, Any] = {}
    lengths = [record.magnitude for record in there if record.magnitude is not None]
    if lengths:
        if len(lengths) < len(there) or any(one.axis == "in" for one in lengths):
            raise CannotHold("is DoRA on a part of a fused module alone, or over its columns", key=module)
        sides["magnitude"] = replace(lengths[0], values=_stacked(module, [one.values for one in lengths]))
    biases = [record.bias for record in there if record.bias is not None]
    if biases:
        if len(biases) < len(there):
            raise CannotHold("changes the bias of a part of a fused module alone", key=module)
        sides["bias"] = _stacked(module, biases)
    return sides


def _joined_lora(module: str, records: Sequence[Record | None], fusion: Rule, fold: Fold) -> Record:
    """Stack ups over one down where it is the same in all parts; else blocks along the diagonal, downs stacked."""
    loras = {index: record for index, record in enumerate(records) if isinstance(record, LoRA)}
    there = list(loras.values())
    complete = len(there) == len(records)
    if any(record.mid is not None for record in there):
        raise CannotHold("is Tucker's form on a fused module", key=module, advice="convert with --as lora")
    sides = _joined_sides(module, there)
    if sides and not complete:
        raise CannotHold("is DoRA, or changes the bias, on a part of a fused module alone", key=module)
    first = there[0]
    scales = {record.scale for record in there}
    if complete and len(scales) == 1 and all(same(first.down, record.down) for record in there[1:]):
        return replace(first, up=_stacked(module, [record.up for record in there]), **sides)
    total = sum(record.rank for record in there)
    scale = first.scale if len(scales) == 1 else 1.0
    ups = [record.up if len(scales) == 1 else fold(record.up, record.scale) for record in there]
    at = next(iter(loras))
    unit = there[0].up.shape[0] // fusion.shares[at]
    for other in ups[1:]:
        _check_type(module, ups[0], other, (0, 2))
    up = Blocks(tuple(ups), tuple(unit * share for share in fusion.shares), tuple(loras))
    alpha = None if scale == 1 else scale * total
    return LoRA(up=up, down=_stacked(module, [record.down for record in there]), alpha=alpha, **sides)
