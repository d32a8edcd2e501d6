"""Whether the tensors of a record belong together, told by their shapes and types before anything is computed from them."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from sdformats.adapters.records import IA3, OFT, Full, GLoRA, InputOFT, LoHa, LoKr, LoRA, Norm
from sdformats.errors import CorruptFile
from sdformats.tensor import DType
from sdformats.views import reshaped

if TYPE_CHECKING:
    from sdformats.adapters.record import Record
    from sdformats.views import Ref

    Pair = tuple[Ref | None, int, Ref | None, int]

_NO_NUMBERS = (DType.BOOL, DType.C64)


def checked(module: str, record: Record) -> Record:
    """Return a record whose tensors have the shapes that it promises, and fit each other.

    Args:
        module: the module's name in the file, for errors.
        record: as the file's names put it together, without its lengths.

    Raises:
        CorruptFile: some do not fit, hold nothing, or hold no real numbers.
    """
    for _, ref in record.refs:
        if ref.spec.numel == 0 or ref.spec.dtype in _NO_NUMBERS:
            raise CorruptFile(f"has a tensor of {ref.spec}", key=module, expected="real numbers, one or more")
    match record:
        case LoRA():
            record = _lora(module, record)
        case LoHa():
            _loha(module, record)
        case LoKr():
            _lokr(module, record)
        case GLoRA():
            record = _glora(module, record)
        case OFT() | InputOFT():
            _rotations(module, record)
        case IA3():
            if record.weight.spec.numel != max(record.weight.shape):
                raise CorruptFile(f"has the factors {record.weight.spec}", key=module, expected="one for each channel")
        case Norm() | Full():
            _differences(module, record)
        case _:
            pass
    if record.bias is not None and record.bias.spec.numel != record.height:
        raise CorruptFile(f"has a bias of {record.bias.spec} and {record.height} rows", key=module)
    return record


def check_lengths(module: str, record: Record) -> None:
    """Check that DoRA has a length for each row; how many columns there are only the model tells.

    Raises:
        CorruptFile: there are more, or fewer.
    """
    lengths, rows = record.magnitude, record.height
    if lengths is not None and lengths.axis == "out" and rows is not None and lengths.values.spec.numel != rows:
        raise CorruptFile(f"has lengths of {lengths.values.spec} and {rows} rows", key=module)


def fits(one: Ref, axis: int, other: Ref, other_axis: int) -> bool:
    """Whether two tensors are as long as each other along an axis of each."""
    return len(one.shape) > axis and len(other.shape) > other_axis and one.shape[axis] == other.shape[other_axis]


def _pairs(module: str, *pairs: Pair) -> None:
    for one, axis, other, other_axis in pairs:
        if one is not None and other is not None and not fits(one, axis, other, other_axis):
            raise CorruptFile(f"has factors that do not fit: {one.spec} and {other.spec}", key=module)


def _thin(module: str, *factors: Ref | None) -> None:
    """Check that factors have no kernel."""
    for one in factors:
        if one is not None and (len(one.shape) < 2 or prod(one.shape[2:]) != 1):
            raise CorruptFile(f"has a factor of {one.spec}", key=module, expected="a matrix")


def _cores(module: str, *cores: Ref | None) -> None:
    """Check that what stands between thin factors is a kernel, the same in all."""
    there = [one for one in cores if one is not None]
    for one in there:
        if len(one.shape) != 4 or one.shape[2:] != there[0].shape[2:]:
            raise CorruptFile(f"has a core of {one.spec}", key=module, expected="(rank, rank, kh, kw)")


def _lora(module: str, record: LoRA) -> LoRA:
    if len(record.up.shape) == 2 and len(record.down.shape) == 4:  # DyLoRA saves it so
        record = replace(record, up=reshaped(record.up, (*record.up.shape, 1, 1)))
    inner = record.down if record.mid is None else record.mid
    _pairs(module, (record.up, 1, inner, 0), (record.mid, 1, record.down, 0))
    _thin(module, record.up, record.down if record.mid is not None else None)
    _cores(module, record.mid)
    return record


def _loha(module: str, record: LoHa) -> None:
    a, b, t = (record.w1_a, record.w2_a), (record.w1_b, record.w2_b), (record.t1, record.t2)
    if (t[0] is None) != (t[1] is None):
        raise CorruptFile("has one core of two", key=module, expected="both hada_t1 and hada_t2, or neither")
    if t[0] is None:
        _pairs(module, (a[0], 1, b[0], 0), (a[1], 1, b[1], 0), (a[0], 0, a[1], 0))
        _thin(module, *a)
    else:
        _pairs(module, *((t[n], axis, factor[n], 0) for n in (0, 1) for axis, factor in ((0, a), (1, b))))
        _pairs(module, (a[0], 1, a[1], 1))
        _thin(module, *a, *b)
        _cores(module, *t)
    if prod(b[0].shape[1:]) != prod(b[1].shape[1:]):
        raise CorruptFile(f"has factors that do not fit: {b[0].spec} and {b[1].spec}", key=module)


def _lokr(module: str, record: LoKr) -> None:
    first = record.w1 is not None or (record.w1_a is not None and record.w1_b is not None)
    second = record.w2 is not None or (record.w2_a is not None and record.w2_b is not None)
    if not (first and second):
        raise CorruptFile("has one factor of a Kronecker product", key=module, expected="both")
    _pairs(module, (record.w1_a, 1, record.w1_b, 0))
    _thin(module, record.w1, record.w1_a, record.w1_b, record.w2_a)
    if record.t2 is None:
        _pairs(module, (record.w2_a, 1, record.w2_b, 0))
    else:
        _pairs(module, (record.t2, 0, record.w2_a, 0), (record.t2, 1, record.w2_b, 0))
        _thin(module, record.w2_b)
        _cores(module, record.t2)
    if record.w2 is not None and len(record.w2.shape) not in (2, 4):
        raise CorruptFile(f"has a factor of {record.w2.spec}", key=module, expected="a matrix or a convolution")


def _glora(module: str, record: GLoRA) -> GLoRA:
    """Tell old GLoRA from new by the shapes: a2 is (rank, in) and a1 (in, rank) today, and was the other way round."""
    old = fits(record.a1, 0, record.b1, 0) and fits(record.b1, 0, record.b2, 1) and fits(record.b2, 1, record.a2, 1)
    new = fits(record.a1, 1, record.a2, 0) and fits(record.b1, 1, record.b2 if record.bm is None else record.bm, 0)
    if not old and not new:
        raise CorruptFile("has factors that do not fit", key=module, expected="GLoRA's a1, a2, b1, b2")
    record = replace(record, old=not new)
    narrow, wide = (record.a2, record.a1) if record.old else (record.a1, record.a2)
    _pairs(module, (narrow, 0, wide, 1), (record.bm, 1, record.b2, 0))
    _thin(module, narrow, wide)
    _cores(module, record.bm)
    return record


def _rotations(module: str, record: OFT | InputOFT) -> None:
    if isinstance(record, InputOFT):
        shape = record.vectors.shape
        if len(shape) != 2 or record.size * (record.size - 1) // 2 != shape[1]:
            raise CorruptFile(f"has rotations of {record.vectors.spec}", key=module, expected="triangles of matrices")
        return
    shape = record.blocks.shape
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        raise CorruptFile(f"has rotations of {record.blocks.spec}", key=module, expected="square matrices")
    if len(shape) == 4 and (shape[-1] % 2 or record.height % (2 ** (shape[0] - 1) * shape[-1])):
        raise CorruptFile(f"has {shape[0]} stages of a butterfly for {record.height} rows", key=module)
    if record.rescale is not None and record.rescale.spec.numel != record.height:
        raise CorruptFile(f"has factors of {record.rescale.spec} and {record.height} rows", key=module)


def _differences(module: str, record: Norm | Full) -> None:
    if isinstance(record, Norm) and record.weight.spec.numel != max(record.weight.shape):
        raise CorruptFile(f"has the factors {record.weight.spec}", key=module, expected="one for each channel")
