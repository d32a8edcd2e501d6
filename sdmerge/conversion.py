"""What ``convert`` does with each kind of file: one function each, found by what the file is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sdformats.custom_diffusion.write import WRITERS as CUSTOM_FORMS
from sdmerge.checkpoints import convert_model
from sdmerge.custom.forms import COMPRESSED, convert_custom
from sdmerge.embedding.convert import convert_embedding
from sdmerge.embedding.write import Wanted
from sdmerge.errors import RequestError
from sdmerge.execute import check_decided, copy_model, no_collection, open_model
from sdmerge.lora.convert import LAYOUT_NAMES, convert_adapter
from sdmerge.small_files import FORMATS, convert_small

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.execute import Report
    from sdmerge.options import Form, Only, Options, Prediction


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a file is to become. Which of these a kind of file can do anything with, its `Converter` says.

    Attributes:
        to: a layout's name; None: the one it has.
        form: ``lora`` or ``full`` turns every record of an adapter into that; None: algorithms stay.
        allow_loss: leave out what the layout cannot hold, instead of refusing.
        adapter_config: PEFT's settings, where they are not beside the file.
        base: the model that an adapter is for, where a change depends on its weights or its shapes.
        token: what the word of an embedding is to be called.
        for_family: what an embedding must be for.
        preview: the picture that an embedding in a PNG is put beside; None: one of its vectors.
        only: the part of a model to write: ``unet`` (or transformer), ``te`` (all text encoders) or ``vae``.
        shard_size: bytes of tensors in a file of a folder, at most.
        prediction: ``epsilon`` or ``v_prediction``, for a folder's scheduler, where nothing in the file tells.
        tokenizer: a folder from which tokenizers are copied.
    """

    to: str | None = None
    form: Form | None = None
    allow_loss: bool = False
    adapter_config: Path | None = None
    base: Path | None = None
    token: str | None = None
    for_family: str | None = None
    preview: Path | None = None
    only: Only | None = None
    shard_size: int | None = None
    prediction: Prediction | None = None
    tokenizer: Path | None = None

    @property
    def given(self) -> frozenset[str]:
        """The names of what differs from its default."""
        return frozenset(one.name for one in fields(self) if getattr(self, one.name) != one.default)


@dataclass(frozen=True)
class Given:
    """A file that is converted.

    Attributes:
        source: its tensors.
        seen: what it is.
        started: when the command began, as `time.perf_counter` told it.
    """

    source: TensorSource
    seen: Detection
    started: float


@dataclass(frozen=True)
class Converter:
    """How a kind is converted.

    Attributes:
        turn: does it.
        takes: what of a `Conversion` it heeds; anything else is refused.
    """

    turn: Callable[[Given, Path, Conversion, Options], Report]
    takes: frozenset[str]


def convert(source: Path, target: Path, conversion: Conversion, options: Options) -> Report:
    """Convert any file.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        with no_collection():
            opened, seen = open_model(stack, source, options)
        check_decided(seen, source)
        converter = _converter(seen, conversion)
        for name in sorted(conversion.given - converter.takes):
            raise RequestError(
                f"{source}: is {seen.kind}, and --{_OPTIONS.get(name, name).replace('_', '-')} is not for such files"
            )
        return converter.turn(Given(opened, seen, started), target, conversion, options)


def _converter(seen: Detection, conversion: Conversion) -> Converter:
    if seen.kind in CONVERTERS:
        return CONVERTERS[seen.kind]
    # What is no adapter that is known is refused by its reader, which says what its names look like.
    return CONVERTERS["adapter"] if conversion.to in LAYOUT_NAMES else _PLAIN


def _copied(given: Given, target: Path, _conversion: Conversion, options: Options) -> Report:
    return copy_model(given.source, given.seen, target, options, given.started)


def _adapter(given: Given, target: Path, conversion: Conversion, options: Options) -> Report:
    if conversion.to is None and not conversion.given:
        return _copied(given, target, conversion, options)
    return convert_adapter(given.source, target, conversion, options, given.started)


def _small(given: Given, target: Path, conversion: Conversion, options: Options) -> Report:
    return convert_small(given.source, given.seen, target, conversion.to, options, given.started)


def _custom(given: Given, target: Path, conversion: Conversion, options: Options) -> Report:
    own = conversion.to is None or conversion.to in CUSTOM_FORMS or conversion.to == COMPRESSED
    if conversion.form is None and (own or conversion.to not in LAYOUT_NAMES):
        return convert_custom(given.source, given.seen, target, conversion, options, given.started)
    return convert_adapter(given.source, target, conversion, options, given.started)


def _embedding(given: Given, target: Path, conversion: Conversion, options: Options) -> Report:
    wanted = Wanted(
        to=conversion.to,
        token=conversion.token,
        family=conversion.for_family,
        preview=conversion.preview,
        allow_loss=conversion.allow_loss,
    )
    return convert_embedding(given.source, target, wanted, options, given.started)


_OPTIONS = {"form": "as", "for_family": "for"}
_PLAIN = Converter(_copied, frozenset())
_OF_MODELS = frozenset({"to", "only", "shard_size", "prediction", "tokenizer", "allow_loss"})
CONVERTERS: Mapping[str, Converter] = {
    **dict.fromkeys(("checkpoint", "unet", "vae", "text-encoder"), Converter(convert_model, _OF_MODELS)),
    "adapter": Converter(_adapter, frozenset({"to", "form", "allow_loss", "adapter_config", "base"})),
    "custom-diffusion": Converter(_custom, frozenset({"to", "form", "allow_loss", "base"})),
    "embedding": Converter(_embedding, frozenset({"to", "token", "for_family", "preview", "allow_loss"})),
    **dict.fromkeys(FORMATS, Converter(_small, frozenset({"to"}))),
}
"""By kind, as `sdformats.layout.Detection` names it. What has no entry is copied, its names kept."""
