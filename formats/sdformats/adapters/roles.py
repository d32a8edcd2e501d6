"""The last parts of tensor names: which suffix means which part of which algorithm, and records from them and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdformats.adapters.record import Magnitude, Record
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, InputOFT, LoHa, LoKr, LoRA, Norm
from sdformats.adapters.shapes import check_lengths, checked
from sdformats.errors import CorruptFile
from sdformats.tensor import DType
from sdformats.views import Constant, Ref, constant, number, numbers, reshaped

Roles = Mapping[str, Ref]
"""A module's tensors by role: the suffix that LyCORIS gives them."""

DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
LENGTHS, MAGNITUDE = "dora_scale", "lora_magnitude_vector"
"""DoRA's lengths as LyCORIS shapes them, which tells the axis, and as PEFT does, one for each row."""

LYCORIS = tuple(
    f"{DOWN} {UP} {MID} {ALPHA} {LENGTHS} scale "
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 "
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t1 lokr_t2 "
    "weight on_input a1.weight a2.weight b1.weight b2.weight bm.weight "
    "oft_blocks oft_diag rescale diff diff_b w_norm b_norm set_weight reshape_weight".split()
)
"""Every role, named as it is written."""
PEFT = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora_A": DOWN,
    "lora_B": UP,
    "lora_B.bias": "diff_b",
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
    "magnitude": MAGNITUDE,
    "oft_R.weight": "oft_R.weight",
}
"""Suffixes of PEFT and those who write like it: role by suffix."""
DIFFUSERS = {
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
    "alpha": ALPHA,
}
KOHYA = {role: role for role in LYCORIS}

_FIELDS: tuple[tuple[type[Record], dict[str, str]], ...] = (
    (LoRA, {UP: "up", DOWN: "down", MID: "mid"}),
    (LoHa, {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
    (LoKr, {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
    (GLoRA, {f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")}),
    (IA3, {"weight": "weight", "on_input": "on_input"}),
    (OFT, {"oft_blocks": "blocks", "rescale": "rescale"}),
    (InputOFT, {"oft_R.weight": "vectors"}),
    (Norm, {"w_norm": "weight"}),
    (Full, {"diff": "weight"}),
)
"""Which field of which record a role is. A module has the first of these of which it has any role."""
_NEEDED = {LoRA: (UP, DOWN), LoHa: tuple(f"hada_w{n}_{x}" for n in "12" for x in "ab"), IA3: ("weight", "on_input")}
_NEEDED |= {GLoRA: ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), OFT: ("oft_blocks",), Norm: ("w_norm",)}


def assemble(module: str, roles: Roles) -> Record:
    """Put a module's tensors together.

    Raises:
        CorruptFile: some are missing, or of two algorithms, or have shapes that do not belong together.
    """
    given = dict(roles)
    if "oft_diag" in given:
        record: Record = OFT(blocks=given.pop("oft_diag"), rescale=given.pop("rescale", None), rotations=True)
        given.pop(ALPHA, None)
        return checked(module, _no_rest(module, given, record))
    if "set_weight" in given:
        record = Full(weight=given.pop("set_weight"), replaces=True, bias=given.pop("diff_b", None))
        return checked(module, _no_rest(module, given, record))
    kind, fields = next(
        ((kind, fields) for kind, fields in _FIELDS if any(role in given for role in fields)),
        (Full, {"diff": "weight"}),
    )
    if missing := [role for role in _NEEDED.get(kind, ()) if role not in given]:
        raise CorruptFile(f"has no {missing[0]}", key=module, expected=f"{missing[0]} beside {next(iter(given))}")
    values: dict[str, Any] = {field: given.pop(role) for role, field in fields.items() if role in given}
    if (t1 := given.pop("lokr_t1", None)) is not None:
        raise CorruptFile("has a lokr_t1, which no tool reads", key=str(next(t1.stored()).key))
    values["bias"] = given.pop("b_norm", None) if kind is Norm else given.pop("diff_b", None)
    if kind is Full and all(value is None for value in values.values()):
        raise CorruptFile(f"has {', '.join(sorted(given))}, and nothing that it is for", key=module, expected="factors")
    if kind is IA3:
        values["on_input"] = bool(number(values["on_input"]))
    if kind is LoRA and (shape := given.pop("reshape_weight", None)) is not None:
        sizes = numbers(shape)
        if not sizes or not all(math.isfinite(size) and size >= 1 and size == int(size) for size in sizes):
            raise CorruptFile(f"has a reshape_weight of {sizes}", key=module, expected="a shape")
        values["reshape"] = tuple(int(size) for size in sizes)
    made = kind(**values)
    return _no_rest(module, given, _scaled(module, checked(module, made), given))


def _no_rest(module: str, given: dict[str, Ref], record: Record) -> Record:
    if given:
        raise CorruptFile(
            f"has tensors of two algorithms: {record.algorithm} and {', '.join(sorted(given))}", key=module
        )
    return record


def _scaled(module: str, record: Record, given: dict[str, Ref]) -> Record:
    """Take alpha (or a plain scale), and DoRA's lengths."""
    changes: dict[str, Any] = {}
    alpha = number(given.pop(ALPHA)) if ALPHA in given else None
    if "scale" in given:
        alpha = number(given.pop("scale")) * (record.rank or 1)
    if isinstance(record, OFT):
        changes["constraint"] = alpha or None
    elif record.rank is not None and not (isinstance(record, LoKr) and record.whole):
        if alpha is not None and not abs(alpha) < float("inf"):
            raise CorruptFile(f"has the alpha {alpha}", key=module, expected="a finite number")
        changes["alpha"] = alpha or None  # 0 is written by tools that mean the rank
    for role in (LENGTHS, MAGNITUDE):
        if role in given:
            changes["magnitude"] = magnitude(module, given.pop(role), record, named=role)
    if not changes:
        return record
    scaled = replace(record, **changes)
    check_lengths(module, scaled)
    return scaled


def magnitude(module: str, values: Ref, record: Record, *, named: str) -> Magnitude:
    """Tell the axis of DoRA's lengths by their shape; PEFT's are always one for each row.

    Raises:
        CorruptFile: the shape is none that tools write.
    """
    size = values.spec.numel
    if named == MAGNITUDE:
        return Magnitude(reshaped(values, (size, 1, *(1,) * (_rank_of(record) - 2))), "out")
    shape = values.shape
    if len(shape) >= 2 and shape[0] == size and all(n == 1 for n in shape[1:]) and size != 1:
        return Magnitude(values, "out")
    if len(shape) >= 2 and shape[1] == size and shape[0] == 1:
        return Magnitude(values, "in")
    raise CorruptFile(f"has {named} of the shape {list(shape)}", key=module, expected="(out, 1) or (1, in)")


def _rank_of(record: Record) -> int:
    """Return how many axes the weight has, as far as the record tells."""
    return max((len(ref.shape) for name, ref in record.refs if name in ("down", "mid", "w2", "t1", "t2")), default=2)


def disassemble(record: Record) -> dict[str, Ref]:
    """Return a record's tensors by role, alpha included; the inverse of `assemble`."""
    kinds = {kind: {name: role for role, name in fields.items()} for kind, fields in _FIELDS}
    found: dict[str, Ref] = {}
    fields = kinds[type(record)]
    for name, ref in record.refs:
        if name in fields and name != "on_input":
            found[fields[name]] = ref
    dtype = main_type(record)
    if isinstance(record, OFT):
        if record.rotations:
            found["oft_diag"] = found.pop("oft_blocks")
        else:  # LyCORIS does not load rotations without one; 0 is no bound
            found[ALPHA] = constant(record.constraint or 0.0, dtype)
    if isinstance(record, Full) and record.replaces:
        found["set_weight"] = found.pop("diff")
    if isinstance(record, IA3):
        found["on_input"] = constant(float(record.on_input), dtype)
    if isinstance(record, LoRA) and record.reshape is not None:
        shape = tuple(float(size) for size in record.reshape)
        found["reshape_weight"] = Constant(shape, DType.I64, (len(shape),))
    if record.alpha is not None:
        found[ALPHA] = constant(record.alpha, dtype)
    if record.magnitude is not None:
        found[LENGTHS] = record.magnitude.values
    if record.bias is not None:
        found["b_norm" if isinstance(record, Norm) else "diff_b"] = record.bias
    return found


def main_type(record: Record) -> DType:
    """Return the type of a record's first tensor, which small numbers beside it take."""
    return next(ref.spec.dtype for _, ref in record.refs)
