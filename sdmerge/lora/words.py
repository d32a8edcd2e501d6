"""Words that adapters carry: embeddings, which a checkpoint has no place for, are written beside it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from sdformats.adapters import open_adapter
from sdformats.adapters.layout import Written
from sdformats.files import open_source
from sdformats.layout import detect
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdmerge.options import Options

_UNSAFE = re.compile(r"[^\w.-]+")


def write_words(adapters: Sequence[Path], output: Path, options: Options) -> tuple[str, ...]:
    """Write every embedding of some adapters as a file of its own, named after the output and the word.

    Args:
        adapters: their files.
        output: what they were baked into.
        options: whether files may be replaced; nothing is written in a dry run.

    Returns:
        A note for each.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    notes = []
    for path in adapters:
        with open_source(path) as source:
            if detect(source.specs, metadata=source.metadata).kind not in ("adapter", "custom-diffusion"):
                continue
            adapter, _ = open_adapter(source)
            for word, inner in adapter.embeddings.items():
                name = _UNSAFE.sub("", word.strip("<>")) or "word"
                target = output.with_name(f"{output.stem}.{name}.safetensors")
                tensors = {"emb_params" if key == "*" else key: ref for key, ref in inner.items()}
                notes.append(f"the embedding {word} of {path.name} is beside it, as {target.name}")
                if not options.dry_run:
                    written = Written(tensors, {})
                    plan = plan_of(written, (source,), adapter.family, Notes())
                    write_out(plan, written, target, options, time.perf_counter(), "writing")
    return tuple(notes)
