"""Words that adapters carry: embeddings, which a checkpoint has no place for, are written beside it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.layout import Written
from sdmerge.errors import RequestError
from sdmerge.execute import check_output
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from sdformats.hypernetwork import Hypernetwork
    from sdformats.tensor import TensorSource
    from sdmerge.options import Options
    from sdmerge.step import Plan

_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Word:
    """An embedding that an adapter carries.

    Attributes:
        target: where it goes.
        note: says so.
        written: its tensors.
        plan: writes them.
    """

    target: Path
    note: str
    written: Written
    plan: Plan


def words_of(
    adapters: Iterable[tuple[TensorSource, Adapter | Hypernetwork]], output: Path, options: Options
) -> list[Word]:
    """Return every embedding of some adapters: a file of its own, named after the output and the word.

    Args:
        adapters: with the files that they are in.
        output: what they are baked into.
        options: whether files may be replaced.

    Raises:
        RequestError: two would have one name.
        OutputExists: there is something of that name.
    """
    found: dict[Path, Word] = {}
    for source, adapter in adapters:
        if not isinstance(adapter, Adapter):
            continue
        for word, inner in adapter.embeddings.items():
            name = _UNSAFE.sub("", word.strip("<>")) or "word"
            target = output.with_name(f"{output.stem}.{name}.safetensors")
            if target in found:
                raise RequestError(
                    f"{source.path}: has an embedding {word}, and so has another adapter (bake one of them)"
                )
            written = Written({"emb_params" if key == "*" else key: ref for key, ref in inner.items()}, {})
            plan = plan_of(written, (source,), adapter.family, Notes())
            check_output(target, plan, options, (".safetensors",))
            note = f"the embedding {word} of {source.path.name} is beside it, as {target.name}"
            found[target] = Word(target, note, written, plan)
    return list(found.values())


def write_words(words: Sequence[Word], options: Options) -> None:
    """Write them.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    for word in words:
        write_out(word.plan, word.written, word.target, options, time.perf_counter(), "writing")
