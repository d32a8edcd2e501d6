"""Convert small files that are no adapters: hypernetworks and the like. Each kind is read and written by its format's module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdformats import hypernetwork
from sdmerge.errors import RequestError, nearest
from sdmerge.execute import no_collection
from sdmerge.lora.refs import in_type
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdformats.adapters.layout import Written
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.execute import Report
    from sdmerge.options import Options


@dataclass(frozen=True)
class Format:
    """How a kind is read and written.

    Attributes:
        read: takes an open file, returns its record.
        writers: by layout: takes a record, returns what is written.
    """

    read: Callable[[TensorSource], Any]
    writers: Mapping[str, Callable[[Any], Written]]


FORMATS: Mapping[str, Format] = {
    "hypernetwork": Format(hypernetwork.read_hypernetwork, hypernetwork.WRITERS),
}
"""By kind."""


def convert_small(
    source: TensorSource, seen: Detection, target: Path, to: str | None, options: Options, started: float
) -> Report:
    """Write a small file in another layout, or in the container that the output's name asks for.

    Args:
        source: a file of one of the kinds in `FORMATS`, open.
        seen: what it is.
        target: where to write.
        to: the layout; None: the one that it is in.
        options: see `Options`.
        started: when the command began, as `time.perf_counter` told it.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    with no_collection():
        written = _written(source, seen, to)
    change = options.output_type
    written = replace(written, tensors={name: in_type(ref, change) for name, ref in written.tensors.items()})
    notes = Notes()
    notes.add(f"{seen.spelling} to {to or seen.spelling}")
    for note in source.notes:
        notes.add(note)
    plan = plan_of(written, (source,), seen.family, notes)
    return write_out(plan, written, target, options, started, "converting")


def _written(opened: TensorSource, seen: Detection, to: str | None) -> Written:
    form = FORMATS[seen.kind]
    record = form.read(opened)
    wanted = to or seen.spelling or ""
    if wanted not in form.writers:
        known = ", ".join(form.writers)
        raise RequestError(
            f"{wanted!r} is no layout of {seen.kind} files (expected {known}){nearest(wanted, form.writers)}"
        )
    return form.writers[wanted](record)
