"""Make one embedding of others: weighted sums, one after the other, a range of vectors."""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from sdformats.embeddings.embedding import Embedding, Word
from sdformats.tensor import DType, Spec
from sdformats.views import joined, rows
from sdmerge.embedding.convert import open_one
from sdmerge.embedding.write import write_embedding
from sdmerge.errors import MismatchError, RequestError
from sdmerge.lora.refs import Computed, in_type
from sdmerge.policy import Notes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdformats.views import Ref
    from sdmerge.embedding.write import Wanted
    from sdmerge.execute import Report
    from sdmerge.options import Options

    Combine = Callable[[Sequence[Ref], Notes], Ref]

_RANGE = re.compile(r"(-?\d+)?(:)?(-?\d+)?")
RECIPE = "sdmerge.embedding"
"""The text that says what an embedding was made of."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How vectors are averaged.

    Attributes:
        weights: one for each input; the vectors are summed up with them.
        pad: let an input with fewer vectors count as zeros where it has none.
        keep_norm: give each vector the average length of those that it is made of: an average is shorter.
    """

    weights: tuple[float, ...]
    pad: bool = False
    keep_norm: bool = False


def mix(paths: Sequence[Path], how: Mix, target: Path, wanted: Wanted, options: Options) -> Report:
    """Write Σ weight · vectors.

    Raises:
        MismatchError: they are for different text encoders, or have different numbers of vectors.
        sdformats.errors.FormatError, sdmerge.errors.SdmergeError: as `convert_embedding`.
    """
    if not all(map(math.isfinite, how.weights)):
        raise RequestError("a weight is no finite number")
    said = [{"name": path.name, "weight": weight} for path, weight in zip(paths, how.weights, strict=True)]
    return _combined(paths, partial(_sum, how), {"mix": said}, target, wanted, options)


def stack(paths: Sequence[Path], target: Path, wanted: Wanted, options: Options) -> Report:
    """Write the vectors of several embeddings one after the other, as one word. Errors as `mix`."""
    said = {"stack": [path.name for path in paths]}
    return _combined(paths, _one_after_the_other, said, target, wanted, options)


def slice_embedding(path: Path, vectors: str | None, word: str | None, target: Path, wanted: Wanted,
                    options: Options) -> Report:  # fmt: skip
    """Write some of an embedding's vectors, or one of its words.

    Args:
        path: the embedding.
        vectors: which, as Python counts: ``0:4``, ``-1``, ``0,2,5:8``; None: all.
        word: the token of a word; None: all words, if no vectors are chosen.
        target, wanted, options: see `write_embedding`.

    Raises:
        RequestError: there is no such word or vector.
        sdformats.errors.FormatError, sdmerge.errors.SdmergeError: as `convert_embedding`.
    """
    started = time.perf_counter()
    with ExitStack() as opened:
        source, embedding, before = open_one(opened, path, options)
        words = embedding.words if word is None else tuple(one for one in embedding.words if one.token == word)
        if not words:
            there = ", ".join(str(one.token or "*") for one in embedding.words)
            raise RequestError(f"{path}: has no word {word!r} (expected one of {there})")
        if vectors is not None:
            words = tuple(_map(one, partial(_some, vectors, path)) for one in words)
        notes = Notes()
        return write_embedding(
            replace(embedding, words=words), (source,), target, wanted, options, started, notes, before=before
        )


def _combined(
    paths: Sequence[Path], combine: Combine, said: Mapping[str, object], target: Path, wanted: Wanted, options: Options
) -> Report:
    started = time.perf_counter()
    notes = Notes()
    with ExitStack() as opened:
        inputs = [open_one(opened, path, options) for path in paths]
        found = [_only_word(path, embedding) for path, (_, embedding, _) in zip(paths, inputs, strict=True)]
        first = found[0]
        for path, word in zip(paths[1:], found[1:], strict=True):
            _check_alike(paths[0], first, path, word)
        made = Word(
            None,
            {name: combine([word.vectors[name] for word in found], notes) for name in first.vectors},
            {name: combine([word.outputs[name] for word in found], notes) for name in first.outputs},
        )
        recipe = {RECIPE: json.dumps(said, ensure_ascii=False)}
        embedding = Embedding((made,), name=wanted.token or target.stem, metadata=recipe)
        called = replace(wanted, token=wanted.token or target.stem)
        sources = tuple(source for source, _, _ in inputs)
        return write_embedding(embedding, sources, target, called, options, started, notes)


def _only_word(path: Path, embedding: Embedding) -> Word:
    if len(embedding.words) > 1:
        names = ", ".join(str(word.token) for word in embedding.words)
        raise RequestError(
            f"{path}: holds {len(embedding.words)} words ({names}); take one out with `sdmerge embedding slice --word`"
        )
    return embedding.words[0]


def _check_alike(path: Path, word: Word, other_path: Path, other: Word) -> None:
    """Refuse words for different text encoders."""
    mine, theirs = _widths(word), _widths(other)
    if mine != theirs:
        raise MismatchError(
            f"{other_path}: its vectors are {_said(theirs)} wide, and those of {path} are {_said(mine)} "
            "(expected embeddings of one family)"
        )


def _widths(word: Word) -> dict[str, int]:
    inside = {name: ref.shape[1] for name, ref in word.vectors.items()}
    return inside | {f"{name}_out": ref.shape[1] for name, ref in word.outputs.items()}


def _said(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{name} {width}" for name, width in sorted(widths.items()))


def _sum(how: Mix, refs: Sequence[Ref], notes: Notes) -> Ref:
    counts = [ref.shape[0] for ref in refs]
    if len(set(counts)) > 1:
        if not how.pad:
            raise MismatchError(
                f"the embeddings have {', '.join(map(str, counts))} vectors (expected as many in each); "
                "--pad counts missing ones as zeros, or use `embedding stack` or `embedding slice`"
            )
        notes.add(f"missing vectors count as zeros, up to {max(counts)}")
    result = Spec((max(counts), refs[0].shape[1]), refs[0].spec.dtype)
    return Computed(partial(_weighted, how), tuple(refs), result)


def _weighted(how: Mix, *tensors: Tensor) -> Tensor:
    """Return Σ w x in float64; with `keep_norm`, as long as Σ |w| ‖x‖ / Σ |w| in each row."""
    count = max(len(tensor) for tensor in tensors)
    padded = [torch.nn.functional.pad(tensor.double(), (0, 0, 0, count - len(tensor))) for tensor in tensors]
    total = torch.stack([weight * tensor for weight, tensor in zip(how.weights, padded, strict=True)]).sum(0)
    if not how.keep_norm:
        return total
    sizes = [abs(weight) for weight in how.weights]
    lengths = torch.stack([size * tensor.norm(dim=1) for size, tensor in zip(sizes, padded, strict=True)]).sum(0)
    wanted = lengths / sum(sizes) if sum(sizes) else lengths
    now = total.norm(dim=1)
    return total * torch.where(now > 0, wanted / now.clamp_min(1e-300), 1.0)[:, None]


def _one_after_the_other(refs: Sequence[Ref], notes: Notes) -> Ref:
    types = {ref.spec.dtype for ref in refs}
    if len(types) == 1:
        return joined(list(refs))
    wide = DType.F64 if DType.F64 in types else DType.F32
    notes.add(f"written in {wide}, as the inputs are of different types")
    counts = sum(ref.shape[0] for ref in refs)
    widened = [in_type(ref, wide) for ref in refs]
    return Computed(lambda *tensors: torch.cat(tensors), tuple(widened), Spec((counts, refs[0].shape[1]), wide))


def _map(word: Word, change: Callable[[Ref], Ref]) -> Word:
    inside = {name: change(ref) for name, ref in word.vectors.items()}
    return Word(word.token, inside, {name: change(ref) for name, ref in word.outputs.items()})


def _some(which: str, path: Path, ref: Ref) -> Ref:
    """Return some of the rows.

    Raises:
        RequestError: the text names none, or one that is not there.
    """
    count = ref.shape[0]
    parts = []
    for text in which.split(","):
        match = _RANGE.fullmatch(text.strip())
        if match is None or not any(match.groups()):
            raise RequestError(f"{which!r} names no vectors (expected something like 0:4 or 0,2,5:8)")
        first, colon, last = match.groups()
        if colon:
            start, stop, _ = slice(int(first) if first else None, int(last) if last else None).indices(count)
        else:
            start = int(first) + (count if int(first) < 0 else 0)
            stop = start + 1
        if not 0 <= start < stop <= count:
            raise RequestError(f"{path}: has no vectors {text.strip()} (expected 0 to {count - 1})")
        parts.append(rows(ref, start, stop))
    return joined(parts)
