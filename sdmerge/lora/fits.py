"""Whether what is trained for a module has the size of the weight that it is for: told before anything is computed."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sdformats.adapters.records import IA3, Full, GLoRA, InputMap, InputOFT, LoHa, LoKr, LoRA, Rows
from sdmerge.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sdformats.adapters.record import Record
    from sdformats.views import Ref


def check_fits(path: str, record: Record, shape: tuple[int, ...], weight: str) -> None:
    """Refuse a record that is for a weight of another size.

    Args:
        path: the module.
        record: what is trained for it.
        shape: the weight's, (out, in[, kh, kw]) or (channels,).
        weight: the weight's name.

    Raises:
        MismatchError: rows, columns or DoRA's lengths are others. It names the adapter's file.
    """
    rows, inputs, columns = shape[0], prod(shape[1:2]), prod(shape[1:])
    sizes = [("rows", record.height, rows)]
    sizes += [("columns", count, columns) for count in _columns(record)]
    sizes += [("inputs", count, inputs) for count in _inputs(record)]
    of = record.of if isinstance(record, Rows) else record
    if of.magnitude is not None and of.magnitude.axis == "in":
        sizes.append(("inputs", of.magnitude.values.spec.numel, inputs))
    if isinstance(of, InputOFT):
        count, size = of.vectors.shape[0], of.size
        sizes.append(("columns", size * count if count > 1 else columns - columns % size, columns))
    for what, found, expected in sizes:
        if found is not None and found != expected:
            raise MismatchError(
                f"{weight!r}: has {expected} {what}, and {path} of {file_of([record])} has {found} "
                "(expected an adapter for this model)"
            )


def file_of(records: Iterable[Record]) -> str:
    """Return the file that records were read from."""
    files = (stored.source.path for record in records for _, ref in record.refs for stored in ref.stored())
    return str(next(files, "the adapter"))


def _columns(record: Record) -> Iterator[int]:
    """Yield how many columns the flattened weight must have."""
    match record:
        case LoRA(mid=core) | LoHa(t1=core) | LoKr(t2=core):
            yield record.columns * _kernel(core)
        case GLoRA():
            yield prod((record.b1 if record.old else record.b2).shape[1:]) * _kernel(record.bm)
        case Full(weight=weight) if weight is not None:
            yield prod(weight.shape[1:])
        case Rows():
            yield from _columns(record.of)
        case _:
            pass


def _inputs(record: Record) -> Iterator[int]:
    """Yield how many inputs the weight must have, whatever its kernel."""
    match record:
        case IA3(on_input=True) | InputMap():
            assert record.columns is not None, "one factor for each input"
            yield record.columns
        case GLoRA():
            yield record.columns
        case Rows():
            yield from _inputs(record.of)
        case _:
            pass


def _kernel(core: Ref | None) -> int:
    return 1 if core is None else prod(core.shape[2:])
