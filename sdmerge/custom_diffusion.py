"""The functions for Custom Diffusion's deltas that ``import sdmerge`` shows, beside those of `sdmerge.api`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from sdmerge.arguments import limit_of, path_of
from sdmerge.options import OptionFields, Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdmerge.arguments import PathLike
    from sdmerge.execute import Report

__all__ = ["compress_custom", "merge_custom"]


def compress_custom(
    delta: PathLike,
    output: PathLike,
    *,
    base: PathLike,
    rank: int | None = None,
    size: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    to: str | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write a Custom Diffusion delta in factors: what its keys and values changed, with the least error.

    Args:
        delta: in any of its forms.
        output: where to write.
        base: the model that it is for.
        rank, size, energy, error: what bounds the ranks, as in `resize_lora`; one of them.
        to: ``original`` or ``delta``; None: the form that it has.
        options: see `sdmerge.options.Options`.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    from sdmerge.custom.compress import Compression, compress

    limit = limit_of(rank, size, energy, error)
    wanted = Compression(delta=Path(delta), base=Path(base), limit=limit, to=to)
    return compress(wanted, Path(output), Options(**options))


def merge_custom(
    deltas: Sequence[tuple[PathLike, str]],
    output: PathLike,
    *,
    base: PathLike,
    captions: PathLike | None = None,
    to: str | None = None,
    model_config: PathLike | None = None,
    tokenizer: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write one delta for the concepts of several, in closed form: each concept's prompts give what its own delta made of them.

    Args:
        deltas: files or folders, each with the class of its concept: ``("cat.bin", "cat")``.
        output: where to write.
        base: the model that they are for, with its text encoder.
        captions: a file with captions of everything else, one a line, that are to change least; None: 200 plain ones.
        to: the form to write; None: that of the first.
        model_config: a diffusers folder that describes a single file's networks.
        tokenizer: a folder with CLIP's vocabulary, where `model_config` has none.
        options: see `sdmerge.options.Options`.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the form has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    from sdmerge.custom.concepts import Concepts, merge_concepts

    wanted = Concepts(
        deltas=tuple((Path(path), name) for path, name in deltas),
        base=Path(base),
        captions=path_of(captions),
        to=to,
        model_config=path_of(model_config),
        tokenizer=path_of(tokenizer),
    )
    return merge_concepts(wanted, Path(output), Options(**options))
