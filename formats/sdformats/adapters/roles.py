"""The last parts of tensor names: which suffix means which part of which algorithm, and records from them and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdformats.adapters.record import Magnitude, Record
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, InputOFT, LoHa, LoKr, LoRA, Norm
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
        return _no_rest(module, given, record)
    if "set_weight" in given:
        return _no_rest(
            module, given, Full(weight=given.pop("set_weight"), replaces=True, bias=given.pop("diff_b", None))
        )
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
    if kind is IA3:
        values["on_input"] = bool(number(values["on_input"]))
    if (shape := given.pop("reshape_weight", None)) is not None:
        values["reshape"] = tuple(int(size) for size in numbers(shape))
    made = kind(**values)
    return _no_rest(module, given, _scaled(module, _checked(module, made), given))


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
    return replace(record, **changes) if changes else record


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


def _checked(module: str, record: Record) -> Record:
    """Check that factors fit together, and give them the shapes that the records promise."""
    pairs: list[tuple[Ref | None, int, Ref | None, int]] = []
    match record:
        case LoRA():
            if len(record.up.shape) == 2 and len(record.down.shape) == 4:  # DyLoRA saves it so
                record = replace(record, up=reshaped(record.up, (*record.up.shape, 1, 1)))
            inner = record.down if record.mid is None else record.mid
            pairs = [(record.up, 1, inner, 0), (record.mid, 1, record.down, 0)]
        case LoHa(t1=None):
            pairs = [(record.w1_a, 1, record.w1_b, 0), (record.w2_a, 1, record.w2_b, 0)]
        case LoHa():
            pairs = [(record.t1, 0, record.w1_a, 0), (record.t1, 1, record.w1_b, 0)]
            pairs += [(record.t2, 0, record.w2_a, 0), (record.t2, 1, record.w2_b, 0)]
        case LoKr():
            record = _both_factors(module, record)
            pairs = [(record.w1_a, 1, record.w1_b, 0)]
            pairs += [(record.w2_a, 1, record.w2_b, 0)] if record.t2 is None else []
        case GLoRA():
            record = _old_or_new(module, record)
        case _:
            pass
    for one, axis, other, other_axis in pairs:
        if one is not None and other is not None and not _fits(one, axis, other, other_axis):
            raise CorruptFile(f"has factors that do not fit: {one.spec} and {other.spec}", key=module)
    return record


def _fits(one: Ref, axis: int, other: Ref, other_axis: int) -> bool:
    return len(one.shape) > axis and len(other.shape) > other_axis and one.shape[axis] == other.shape[other_axis]


def _both_factors(module: str, record: LoKr) -> LoKr:
    first = record.w1 is not None or (record.w1_a is not None and record.w1_b is not None)
    second = record.w2 is not None or (record.w2_a is not None and record.w2_b is not None)
    if not (first and second):
        raise CorruptFile("has one factor of a Kronecker product", key=module, expected="both")
    return record


def _old_or_new(module: str, record: GLoRA) -> GLoRA:
    """Tell old GLoRA from new by the shapes: a2 is (rank, in) and a1 (in, rank) today, and was the other way round."""
    old = _fits(record.a1, 0, record.b1, 0) and _fits(record.b1, 0, record.b2, 1) and _fits(record.b2, 1, record.a2, 1)
    new = _fits(record.a1, 1, record.a2, 0) and _fits(record.b1, 1, record.b2, 0)
    if not old and not new:
        raise CorruptFile("has factors that do not fit", key=module, expected="GLoRA's a1, a2, b1, b2")
    return replace(record, old=not new)


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
