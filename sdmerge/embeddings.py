"""The functions for embeddings that ``import sdmerge`` shows, beside those of `sdmerge.api`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from sdmerge.errors import RequestError
from sdmerge.options import OptionFields, Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdmerge.arguments import PathLike
    from sdmerge.embedding.write import Wanted
    from sdmerge.execute import Report

__all__ = ["bundle_embeddings", "extract_embeddings", "mix_embeddings", "slice_embedding",
           "stack_embeddings"]  # fmt: skip


def mix_embeddings(
    embeddings: Sequence[PathLike | tuple[PathLike, float]],
    output: PathLike,
    *,
    normalize: bool = False,
    pad: bool = False,
    keep_norm: bool = False,
    to: str | None = None,
    token: str | None = None,
    for_family: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write the weighted sum of the vectors of embeddings of one family.

    Args:
        embeddings: each a path, or a path and its weight. Without any weight all count the same: 1 / n.
        normalize: divide the weights by their sum.
        pad: let missing vectors count as zeros, where the numbers of vectors differ.
        keep_norm: give each vector the average length of those that it is made of.
        output, to, token, for_family, options: as in `sdmerge.api.convert`.

    Raises:
        as `convert`; MismatchError where they do not fit together.
    """
    from sdmerge.embedding.combine import Mix, mix

    if len(embeddings) < 2:
        raise RequestError("one embedding is no mix (expected two or more)")
    weighted = any(isinstance(one, tuple) for one in embeddings)
    even = 1.0 if weighted else 1 / len(embeddings)
    pairs = [one if isinstance(one, tuple) else (one, even) for one in embeddings]
    total = sum(weight for _, weight in pairs)
    if normalize and not total:
        raise RequestError("the weights add up to nothing (expected a sum to divide them by)")
    weights = tuple(float(weight / total if normalize else weight) for _, weight in pairs)
    how = Mix(weights=weights, pad=pad, keep_norm=keep_norm)
    return mix([Path(path) for path, _ in pairs], how, Path(output), _wanted(to, token, for_family), Options(**options))


def stack_embeddings(
    embeddings: Sequence[PathLike],
    output: PathLike,
    *,
    to: str | None = None,
    token: str | None = None,
    for_family: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write the vectors of several embeddings one after the other, as one word.

    Args:
        embeddings: two or more of one family.
        output, to, token, for_family, options: as in `convert`.

    Raises:
        as `mix_embeddings`.
    """
    from sdmerge.embedding.combine import stack

    if len(embeddings) < 2:
        raise RequestError("one embedding is no stack (expected two or more)")
    return stack([Path(path) for path in embeddings], Path(output), _wanted(to, token, for_family), Options(**options))


def slice_embedding(
    source: PathLike,
    output: PathLike,
    *,
    vectors: str | None = None,
    word: str | None = None,
    to: str | None = None,
    token: str | None = None,
    for_family: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write some of an embedding's vectors, or one of its words.

    Args:
        source: the embedding.
        vectors: which, counted from 0 as in Python: ``"0:4"``, ``"-1"``, ``"0,2,5:8"``.
        word: the token of one word, where there are several.
        output, to, token, for_family, options: as in `convert`.

    Raises:
        as `convert`.
    """
    from sdmerge.embedding.combine import slice_embedding as cut

    if vectors is None and word is None:
        raise RequestError("nothing is chosen (expected vectors, as 0:4, or a word)")
    return cut(Path(source), vectors, word, Path(output), _wanted(to, token, for_family), Options(**options))


def extract_embeddings(
    adapter: PathLike,
    output: PathLike,
    *,
    word: str | None = None,
    to: str | None = None,
    token: str | None = None,
    for_family: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write the embeddings that an adapter carries into a file of their own.

    Args:
        adapter: a LoRA or one of its relatives.
        word: one of them; None: all.
        output, to, token, for_family, options: as in `convert`.

    Raises:
        as `convert`.
    """
    from sdmerge.embedding.bundle import extract

    return extract(Path(adapter), word, Path(output), _wanted(to, token, for_family), Options(**options))


def bundle_embeddings(
    adapter: PathLike,
    embeddings: Sequence[PathLike],
    output: PathLike,
    *,
    token: str | None = None,
    for_family: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write an adapter with embeddings in it, in the adapter's own layout.

    Args:
        adapter: a LoRA or one of its relatives.
        embeddings: one or more. Those whose word has no token are called after their files.
        output: where to write.
        token: what a single word is to be called.
        for_family, options: as in `convert`.

    Raises:
        as `convert`.
    """
    from sdmerge.embedding.bundle import bundle

    if not embeddings:
        raise RequestError("there is no embedding to put in (expected at least one)")
    wanted = _wanted(None, token, for_family)
    return bundle(Path(adapter), [Path(path) for path in embeddings], Path(output), wanted, Options(**options))


def _wanted(to: str | None, token: str | None, family: str | None) -> Wanted:
    from sdmerge.embedding.write import Wanted

    return Wanted(to=to, token=token, family=family)
