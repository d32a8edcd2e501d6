"""The functions for Custom Diffusion's deltas that ``import sdmerge`` shows, beside those of `sdmerge.api`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from sdmerge.options import OptionFields, Options

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from sdmerge.execute import Report

    PathLike = str | os.PathLike[str]

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
    from sdmerge.lora.budget import Limit
    from sdmerge.sizes import parse_size

    limit = Limit(rank=rank, size=None if size is None else parse_size(size), energy=energy, error=error)
    return compress(
        Compression(delta=Path(delta), base=Path(base), limit=limit, to=to), Path(output), Options(**options)
    )


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

    given = {"captions": captions, "model_config": model_config, "tokenizer": tokenizer}
    paths = {name: None if path is None else Path(path) for name, path in given.items()}
    wanted = Concepts(deltas=tuple((Path(path), name) for path, name in deltas), base=Path(base), to=to, **paths)
    return merge_concepts(wanted, Path(output), Options(**options))
