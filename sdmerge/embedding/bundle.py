"""Embeddings inside adapters: take them out, and put them in."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.adapters import open_adapter
from sdformats.adapters.reading import check_holds
from sdformats.embeddings.embedding import Embedding, Word, encoder_of
from sdformats.embeddings.layouts.bundle import LONE, names
from sdformats.files import open_source
from sdformats.views import reshaped
from sdmerge.embedding.convert import open_one
from sdmerge.embedding.write import check_family, write_embedding
from sdmerge.errors import FamilyError, RequestError
from sdmerge.lora.convert import mapped
from sdmerge.lora.refs import fold
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sdformats.views import Ref
    from sdmerge.embedding.write import Wanted
    from sdmerge.execute import Report
    from sdmerge.options import Options


def extract(adapter: Path, word: str | None, target: Path, wanted: Wanted, options: Options) -> Report:
    """Write the embeddings that an adapter carries.

    Args:
        adapter: a LoRA or one of its relatives.
        word: which of them; None: all.
        target, wanted, options: see `write_embedding`.

    Raises:
        RequestError: it carries none, or not this one.
        sdformats.errors.FormatError, sdmerge.errors.SdmergeError: as `convert_embedding`.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(adapter))
        found = open_adapter(source)[0].embeddings
        chosen = {name: inner for name, inner in found.items() if word in (None, name)}
        if not chosen:
            there = f"expected one of {', '.join(found)}" if found else "it carries none at all"
            raise RequestError(f"{adapter}: carries no embedding {word or ''}".rstrip() + f" ({there})")
        words = tuple(Word(name, _by_encoder(inner)) for name, inner in chosen.items())
        notes = Notes()
        return write_embedding(Embedding(words), (source,), target, wanted, options, started, notes)


def _by_encoder(inner: Mapping[str, Ref]) -> dict[str, Ref]:
    rows = {key: reshaped(ref, (1, *ref.shape)) if len(ref.shape) == 1 else ref for key, ref in inner.items()}
    return {encoder_of(ref.shape[1], "bert") if key == "*" else key: ref for key, ref in rows.items()}


def bundle(adapter: Path, embeddings: Sequence[Path], target: Path, wanted: Wanted, options: Options) -> Report:
    """Write an adapter with embeddings in it, in the adapter's own layout. Words without a token are called after their files.

    Raises:
        RequestError: two embeddings have one name.
        FamilyError: an embedding is for another family than the adapter.
        sdformats.errors.FormatError: `CannotHold` where the adapter's layout has no place for embeddings.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(adapter))
        found, layout = open_adapter(source)
        notes = Notes()
        inside = dict(found.embeddings)
        sources = [source]
        for path in embeddings:
            one, embedding, _ = open_one(stack, path, options)
            check_family(embedding, wanted.family, path)
            if found.family and embedding.family and found.family != embedding.family:
                raise FamilyError(f"{path}: is for {embedding.family}, and {adapter} for {found.family}")
            sources.append(one)
            for word in embedding.words:
                name = wanted.token or word.token or path.stem
                if name in inside:
                    raise RequestError(f"{path}: there is an embedding called {name} in the adapter already")
                inside[name] = {"*" if key == LONE else key: ref for key, ref in names(word).items()}
                notes.add("put into the adapter", name)
        whole = replace(found, embeddings=inside)
        check_holds(layout, whole)
        assert layout.write is not None, "check_holds refuses layouts that are only read"
        written = layout.write(layout, mapped(whole, options), fold)
        plan = plan_of(written, tuple(sources), found.family, notes)
        return write_out(plan, written, target, options, started, "writing")
