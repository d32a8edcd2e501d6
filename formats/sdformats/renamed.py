"""A model under the names of its other spelling: a source like any other, which cuts and joins while it is read."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from sdformats.errors import UnsupportedFile
from sdformats.keymap import KeyMap
from sdformats.layout import DIFFUSERS, detect
from sdformats.layouts import KEY_MAPS
from sdformats.layouts.vae import VAE
from sdformats.tensor import TensorSource
from sdformats.views import Stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdformats.keymap import Respelled
    from sdformats.layout import Detection
    from sdformats.views import Ref


class Renamed(TensorSource):
    """Views of the tensors of other sources as a source. It closes and verifies them.

    Args:
        tensors: views by the names they have here.
        sources: what they are views of; the first tells the path.
        notes: see `TensorSource`; what the sources note comes first.
    """

    def __init__(self, tensors: Mapping[str, Ref], sources: Sequence[TensorSource], notes: Sequence[str] = ()) -> None:
        self.path = sources[0].path
        self.container = sources[0].container
        self.specs = {name: ref.spec for name, ref in tensors.items()}
        self.metadata = {key: text for source in reversed(sources) for key, text in source.metadata.items()}
        self.notes = (*(note for source in sources for note in source.notes), *notes)
        self.files = tuple(file for source in sources for file in source.files)
        self._tensors = dict(tensors)
        self._sources = tuple(sources)
        firsts = accumulate((len(source.files) for source in sources), initial=0)
        self._first_file = {id(source): first for source, first in zip(sources, firsts, strict=False)}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._tensors[name].read_range(offset, buffer)

    def position(self, name: str) -> tuple[int, int]:
        """See `TensorSource.position`. A tensor lies where the first of what it is made of does."""
        first = next(self._tensors[name].stored(), None)
        if first is None:
            return (0, 0)
        file, offset = first.source.position(first.key)
        return self._first_file[id(first.source)] + file, offset

    def extent(self, name: str) -> tuple[int, int] | None:
        ref = self._tensors[name]
        parts = list(ref.stored()) if ref.in_order else []
        whole = len(parts) == 1 and parts[0].spec.nbytes == ref.spec.nbytes
        return parts[0].source.extent(parts[0].key) if whole else None

    def verify(self) -> None:
        for source in self._sources:
            source.verify()

    def close(self) -> None:
        for source in self._sources:
            source.close()


def key_map(seen: Detection) -> KeyMap:
    """Return how a model is spelled.

    Raises:
        UnsupportedFile: nothing tells its family, or there is no key map for what it is.
    """
    if seen.kind == "vae":
        return KeyMap((VAE,))
    if seen.kind not in ("checkpoint", "unet") or seen.family not in KEY_MAPS:
        what = f"{seen.family} {seen.kind}" if seen.family else seen.kind
        raise UnsupportedFile(
            f"is {what}, whose other spelling is not known", expected="a whole model, its network or its VAE"
        )
    if seen.variant == "unclip":
        raise UnsupportedFile("is an unCLIP model, whose other spelling is not known")
    return KEY_MAPS[seen.family]


def respelled(tensors: Mapping[str, Ref], seen: Detection, spelling: str) -> Respelled:
    """Return a model's tensors in another spelling.

    Args:
        tensors: by name.
        seen: what they are.
        spelling: ``single-file`` or ``diffusers``, and not the one they have.

    Raises:
        UnsupportedFile: see `key_map`.
        CorruptFile: what must be cut or joined cannot be.
    """
    known = key_map(seen)
    alone = None if seen.kind == "checkpoint" else known.components[0].name
    turn = known.to_folder if spelling == DIFFUSERS else known.to_single
    return turn(tensors, alone=alone)


def stored(source: TensorSource) -> dict[str, Ref]:
    """Return every tensor of a source as it is."""
    return {name: Stored(source, name) for name in source.specs}


def spelled(source: TensorSource, spelling: str, *, family: str | None = None) -> TensorSource:
    """Return a model in a spelling: as it is, or as a view that owns it.

    What a single file has no place for (a safety checker) is not in it, and the view's notes say so.

    Args:
        source: a model in either spelling, open.
        spelling: ``single-file`` or ``diffusers``.
        family: overrides what the structure tells.

    Raises:
        FormatError: its structure does not tell what it is, or it cannot be spelled so.
    """
    seen = detect(source.specs, family=family)
    if seen.spelling == spelling:
        return source
    made = respelled(stored(source), seen, spelling)
    notes = (
        [f"{len(made.left):,} tensors have no place in a single file, among them {made.left[0]}"] if made.left else []
    )
    return Renamed(made.tensors, (source,), notes)


def component(source: TensorSource, name: str, *, family: str | None = None) -> TensorSource:
    """Return one component of a model, under the bare names that diffusers and transformers give them today.

    Nothing is read before it is asked for; closing it closes the source.

    Args:
        source: a model in either spelling, open.
        name: as the folder is called: ``unet``, ``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``, …
        family: overrides what the structure tells.

    Raises:
        FormatError: see `spelled`; or the model has no such component.
    """
    seen = detect(source.specs, family=family)
    part = next((part for part in key_map(seen).components if part.name == name), None)
    whole = spelled(source, DIFFUSERS, family=family)
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): Stored(whole, key) for key in whole.specs if key.startswith(prefix)}
    if seen.kind != "checkpoint" and not tensors:  # a component's own file, in diffusers' spelling
        tensors = {key: Stored(whole, key) for key in whole.specs}
    if part is None or not tensors:
        there = sorted({key.partition(".")[0] for key in whole.specs})
        raise UnsupportedFile(f"has no {name}", path=source.path, expected=f"one of {', '.join(there[:8])}")
    return Renamed({part.dialect(key): ref for key, ref in tensors.items()}, (whole,))
