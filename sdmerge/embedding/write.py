"""Write embeddings: which layout in which container, and what has no place in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from sdformats.adapters.errors import CannotHold
from sdformats.embeddings import LAYOUTS
from sdformats.embeddings.embedding import FAMILIES, WIDTHS, Embedding, Word
from sdformats.embeddings.layout import check_holds
from sdformats.renamed import Renamed
from sdformats.torch_sink import SUFFIXES
from sdformats.views import Stored
from sdmerge.errors import FamilyError, RequestError, nearest
from sdmerge.lora.refs import Cast, Computed, in_type, step_of
from sdmerge.step import Plan, Read, Step, ordered
from sdmerge.writing import write_out

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdformats.adapters.layout import Written
    from sdformats.embeddings.layout import Container, EmbeddingLayout
    from sdformats.png.pixels import Pixels
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.options import Options
    from sdmerge.policy import Notes

_USUAL: dict[str, tuple[str, ...]] = {
    "safetensors": ("kohya", "diffusers", "bundle"),
    "torch": ("a1111", "kohya", "diffusers"),
    "png": ("a1111", "kohya"),
    "folder": ("diffusers-pair",),
}
"""Layouts by container, the one that most programs read first."""
_ENDINGS = {"safetensors": "a name that ends in .safetensors", "png": "a name that ends in .png",
            "torch": "a name that ends in .pt or .bin", "folder": "a name without an ending"}  # fmt: skip
PNG = "png"
"""Not a layout of its own, but users ask for it like one."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an embedding is to become.

    Attributes:
        to: a layout's name, or ``png``; None: the usual one for the output's ending.
        token: what the word is to be called; None: as it is called now, or after the file.
        family: what it must be for; None: anything.
        preview: the picture that an embedding in a PNG is put beside; None: a picture of its vectors.
        allow_loss: leave out what the layout has no place for, instead of refusing.
    """

    to: str | None = None
    token: str | None = None
    family: str | None = None
    preview: Path | None = None
    allow_loss: bool = False


def write_embedding(
    embedding: Embedding,
    sources: tuple[TensorSource, ...],
    target: Path,
    wanted: Wanted,
    options: Options,
    started: float,
    notes: Notes,
    *,
    before: EmbeddingLayout | None = None,
) -> Report:
    """Write an embedding; in a dry run, say what would be.

    Args:
        embedding: called as it should be.
        sources: the files that it comes from; none, where its vectors are in memory.
        target: where to write; its ending tells the container.
        wanted: see there.
        options: dtype, overwrite and the like.
        started: when the command began, as `time.perf_counter` told it.
        notes: what was decided so far.
        before: the layout that it is in.

    Raises:
        CannotHold: the layout has no place for something.
        RequestError: the layout is not written into such a container.
        FamilyError: it is for another family.
        sdformats.errors.FormatError: the output cannot be written.
    """
    path = sources[0].path if sources else target
    check_family(embedding, wanted.family, path)
    container = container_of(target)
    if wanted.allow_loss:
        embedding = _without_outputs(embedding, notes)
    layout = chosen_layout(wanted.to, container, embedding, target)
    embedding = _called(embedding, layout, wanted.token, path, target, notes)
    check_holds(layout, embedding)
    assert layout.write is not None, "check_holds refuses layouts that are only read"
    if options.output_type is not None:
        embedding = mapped(embedding, partial(in_type, dtype=options.output_type))
    written = layout.write(embedding)
    notes.add(f"{before.name} to {layout.name}" if before is not None else f"written as {layout.name}")
    _tell_lost(embedding, written, container, layout, notes)
    plan = _plan(written.tensors, sources, embedding.family, notes)
    paint = partial(_paint, embedding, wanted.preview) if container == "png" else None
    return write_out(plan, written, target, options, started, "writing", paint)


def _paint(embedding: Embedding, preview: Path | None) -> Pixels:
    from sdmerge.embedding.picture import picture_for

    return picture_for(embedding, preview)


def check_family(embedding: Embedding, family: str | None, path: Path) -> None:
    """Refuse an embedding for another family.

    Raises:
        FamilyError: it is for another, or its widths are of no known family.
        RequestError: there is no such family.
    """
    if family is None or embedding.family == family:
        return
    if family not in FAMILIES.values():
        known = tuple(dict.fromkeys(FAMILIES.values()))
        raise RequestError(f"there are no embeddings for {family!r} (expected one of {', '.join(known)})")
    has = " and ".join(f"{name} {ref.shape[1]}" for name, ref in embedding.words[0].vectors.items()) or "no vectors"
    needs = next(encoders for encoders, one in FAMILIES.items() if one == family)
    wants = " and ".join(f"{name} {width}" for name, width in WIDTHS.items() if name in needs)
    told = f"is for {embedding.family}" if embedding.family else "is for no known family"
    raise FamilyError(
        f"{path}: {told}, not for {family}: its vectors are {has} wide (expected {wants}); "
        "an embedding cannot be turned into another family's, only trained anew"
    )


def container_of(target: Path) -> Container:
    """Return the container that an output's ending asks for.

    Raises:
        RequestError: none has this ending.
    """
    ending = target.suffix.lower()
    if ending in SUFFIXES:
        return "torch"
    endings: dict[str, Container] = {".safetensors": "safetensors", ".png": "png", "": "folder"}
    if ending not in endings:
        raise RequestError(f"{target}: no embedding ends so (expected .safetensors, .pt, .bin or .png)")
    return endings[ending]


def chosen_layout(name: str | None, container: Container, embedding: Embedding, target: Path) -> EmbeddingLayout:
    """Return the layout that is asked for, or the usual one that holds the embedding.

    Raises:
        RequestError: there is none of that name, or it is not written into such a container.
        CannotHold: none that is usual there has a place for everything.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    if name is None or name == PNG:
        if name == PNG and container != "png":
            raise RequestError(f"{target}: a picture is wanted (expected {_ENDINGS['png']})")
        usual = _USUAL[container]
        order = ("diffusers", *usual) if target.suffix.lower() == ".bin" else usual
        return _first_that_holds([known[one] for one in order], embedding)
    if name not in known:
        raise RequestError(
            f"{name!r} is no layout of embeddings (expected one of {', '.join((*known, PNG))}){nearest(name, (*known, PNG))}"
        )
    layout = known[name]
    if layout.containers and container not in layout.containers:
        expected = " or ".join(_ENDINGS[one] for one in layout.containers)
        raise RequestError(f"{target}: the layout {name} is not written into such a file (expected {expected})")
    return layout


def _first_that_holds(layouts: Sequence[EmbeddingLayout], embedding: Embedding) -> EmbeddingLayout:
    for layout in layouts:
        try:
            check_holds(layout, embedding)
        except CannotHold:
            continue
        return layout
    check_holds(layouts[0], embedding)
    raise AssertionError("it was refused a moment ago")


def _called(
    embedding: Embedding, layout: EmbeddingLayout, token: str | None, source: Path, target: Path, notes: Notes
) -> Embedding:
    """Give every word the token that a layout needs, and the embedding the name inside."""
    if token is not None:
        if len(embedding.words) > 1:
            raise RequestError(f"{source}: holds {len(embedding.words)} words, and --token names one")
        return replace(embedding, words=(replace(embedding.words[0], token=token),), name=token.strip("<>"))
    words = []
    for word in embedding.words:
        if layout.names and word.token is None:
            notes.add(f"its word is called {source.stem}, after the file (--token names it otherwise)")
            words.append(replace(word, token=source.stem))
            continue
        if not layout.names and word.token is not None and word.token != target.stem:
            notes.add(f"programs call its word what the file is called, {target.stem}; it was {word.token}")
        words.append(word)
    first = words[0].token
    name = embedding.name or (first.strip("<>") if first else target.stem)
    return replace(embedding, words=tuple(words), name=name)


def _without_outputs(embedding: Embedding, notes: Notes) -> Embedding:
    words = []
    for word in embedding.words:
        for encoder in word.outputs if word.vectors else ():
            notes.add("left out: vectors behind a text encoder", f"{encoder}_out")
        words.append(Word(word.token, word.vectors) if word.vectors else word)
    return replace(embedding, words=tuple(words))


def mapped(embedding: Embedding, change: partial[Ref]) -> Embedding:
    """Return an embedding with every tensor changed."""
    words = tuple(
        Word(
            word.token,
            {encoder: change(ref) for encoder, ref in word.vectors.items()},
            {encoder: change(ref) for encoder, ref in word.outputs.items()},
        )
        for word in embedding.words
    )
    return replace(embedding, words=words)


def _tell_lost(
    embedding: Embedding, written: Written, container: Container, layout: EmbeddingLayout, notes: Notes
) -> None:
    """Note the texts that have no place in the output."""
    if container in ("safetensors", "folder"):
        kept: Mapping[str, object] = written.metadata
    else:
        kept = written.tree if isinstance(written.tree, Mapping) else {}
    for key in embedding.texts:
        if key not in kept:
            notes.add(f"left out, as {layout.name} has no place for texts there", key)


def _plan(tensors: Mapping[str, Ref], sources: tuple[TensorSource, ...], family: str | None, notes: Notes) -> Plan:
    """Return the plan: bytes are copied, however they are cut and joined; what is computed is rounded once."""
    bare = {name: ref.of if isinstance(ref, Cast) else ref for name, ref in tensors.items()}
    views = {name: ref for name, ref in bare.items() if _is_view(ref)}
    if not views:
        steps = [step_of(name, ref) for name, ref in tensors.items()]
        return Plan(ordered(steps, sources), tuple(tensors), sources, notes.lines(), family)
    view = Renamed(views, sources)
    steps = [
        Step(name, ref.spec, (Read(view, name),), why="copy") if name in view.specs else step_of(name, ref)
        for name, ref in tensors.items()
    ]
    return Plan(ordered(steps, (view, *sources)), tuple(tensors), (view, *sources), notes.lines(), family)


def _is_view(ref: Ref) -> bool:
    """Whether a tensor is bytes of files, perhaps cut and joined."""
    if isinstance(ref, Stored):
        return True
    return bool(ref.parts) and not isinstance(ref, Cast | Computed) and all(_is_view(part) for part in ref.parts)
