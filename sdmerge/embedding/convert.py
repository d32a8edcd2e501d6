"""Convert an embedding into another layout and container: names and texts change, vectors do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.embeddings import open_embedding
from sdformats.errors import FormatError
from sdformats.files import open_source
from sdformats.layout import detect
from sdmerge.embedding.write import write_embedding
from sdmerge.errors import RequestError
from sdmerge.policy import Notes

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from sdformats.embeddings.embedding import Embedding
    from sdformats.embeddings.layout import EmbeddingLayout
    from sdformats.tensor import TensorSource
    from sdmerge.embedding.write import Wanted
    from sdmerge.execute import Report
    from sdmerge.options import Options

Opened = tuple["TensorSource", "Embedding", "EmbeddingLayout"]


def convert_embedding(source: TensorSource, target: Path, wanted: Wanted, options: Options, started: float) -> Report:
    """Write an embedding in another layout.

    Args:
        source: a file with an embedding, open.
        target: where to write; its ending tells the container.
        wanted: what it is to become.
        options: see `Options`.
        started: when the command began, as `time.perf_counter` told it.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    embedding, before = open_embedding(source)
    notes = Notes()
    notes.take(embedding.notes)
    return write_embedding(embedding, (source,), target, wanted, options, started, notes, before=before)


def open_one(stack: ExitStack, path: Path, options: Options) -> Opened:
    """Open an embedding for as long as `stack` lives.

    What could be something else too is taken for one: nothing else is asked for.

    Raises:
        sdformats.errors.FormatError: it cannot be read, or is none.
        RequestError: it is an adapter.
    """
    source = stack.enter_context(open_source(path))
    seen = detect(source.specs, metadata=source.metadata, kind=options.kind)
    if len(seen.readings) > 1:
        seen = detect(source.specs, metadata=source.metadata, kind="embedding")
    if seen.kind == "adapter":
        raise RequestError(
            f"{path}: is an adapter; take the embeddings that it carries out of it with `sdmerge embedding extract`"
        )
    if seen.kind != "embedding":
        what = seen.readings[0].title if seen.readings else seen.kind
        raise FormatError(f"is {what}", path=path, expected="an embedding")
    return source, *open_embedding(source)
