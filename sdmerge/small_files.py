"""Convert small files that are no adapters: hypernetworks and the like. Each kind is read and written by its format's module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdformats import aesthetic, clip_inversion, hypernetwork, null_text
from sdformats.renamed import Renamed, stored
from sdformats.torch_sink import SUFFIXES as TORCH_SUFFIXES
from sdmerge.errors import RequestError, nearest
from sdmerge.execute import no_collection
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, typed, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sdformats.adapters.layout import Written
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.options import Options


@dataclass(frozen=True)
class Format:
    """How a kind is read and written.

    Attributes:
        read: takes an open file, returns its record.
        writers: by layout: takes a record, returns what is written.
        usual: the layout where none is asked for, in a file for torch and in safetensors; None: the one that it has.
    """

    read: Callable[[TensorSource], Any]
    writers: Mapping[str, Callable[[Any], Written]]
    usual: tuple[str | None, str | None] = (None, None)

    def layout_for(self, target: Path, before: str | None) -> str:
        """Return the layout where none is asked for."""
        return self.usual[0 if target.suffix.lower() in TORCH_SUFFIXES else 1] or before or ""


FORMATS: Mapping[str, Format] = {
    "hypernetwork": Format(hypernetwork.read_hypernetwork, hypernetwork.WRITERS),
    "aesthetic": Format(aesthetic.read_aesthetic, aesthetic.WRITERS, usual=("bare", "named")),
    "null-text": Format(null_text.read_null_text, null_text.WRITERS, usual=(None, "named")),
    "clip-inversion": Format(clip_inversion.read_clip_inversion, clip_inversion.WRITERS),
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
    layout = to or FORMATS[seen.kind].layout_for(target, seen.spelling)
    with no_collection():
        written = _written(source, seen, layout)
    tensors, sources = as_stored(written.tensors, (source,))
    written = typed(replace(written, tensors=tensors), options.output_type)
    notes = Notes()
    notes.add(f"{seen.spelling} to {layout}")
    notes.take(source.notes)
    if written.metadata and not isinstance(written.tree, Mapping) and target.suffix.lower() in TORCH_SUFFIXES:
        notes.add(f"left out, as the layout {layout} has no place for texts: {', '.join(written.metadata)}")
    plan = plan_of(written, sources, seen.family, notes)
    return write_out(plan, written, target, options, started, "converting")


def as_stored(
    tensors: Mapping[str, Ref], sources: Sequence[TensorSource]
) -> tuple[dict[str, Ref], tuple[TensorSource, ...]]:
    """Return views as tensors of one source, so that they are copied bit by bit, whatever they hold."""
    renamed = Renamed(tensors, sources)
    return stored(renamed), (renamed,)


def _written(opened: TensorSource, seen: Detection, wanted: str) -> Written:
    form = FORMATS[seen.kind]
    record = form.read(opened)
    if wanted not in form.writers:
        known = ", ".join(form.writers)
        raise RequestError(
            f"{wanted!r} is no layout of {seen.kind} files (expected {known}){nearest(wanted, form.writers)}"
        )
    return form.writers[wanted](record)
