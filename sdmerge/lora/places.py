"""Where an adapter's modules are in a model: which tensor, which of its rows, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from sdformats.adapters import names
from sdformats.layout import DIFFUSERS, SINGLE_FILE, component_of, detect
from sdformats.layouts import KEY_MAPS, clip, t5
from sdformats.rule import one
from sdformats.views import Ref, Stored, halves_swapped, rows
from sdmerge.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdformats.rule import Rule
    from sdformats.tensor import TensorSource

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_MOST_LAYERS = 32
_ALSO = {"te1": ("text_encoders.clip_h.transformer.",), "te2": ("conditioner.embedders.1.transformer.",)}
"""Prefixes of transformers' names where key maps know OpenCLIP's alone: some programs write them."""


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        weight: the tensor's name.
        bias: its bias's name, where there is one.
        index, shares: which part of the tensor's rows it is; (0, (1,)) for all of them.
        transposed: whether the tensor is (in, out).
        swapped: whether the halves of the rows are the other way round.
    """

    weight: str
    bias: str
    index: int = 0
    shares: tuple[int, ...] = (1,)
    transposed: bool = False
    swapped: bool = False

    def range_of(self, rows_in_all: int) -> tuple[int, int]:
        """Return the first row and the one after the last."""
        unit = rows_in_all // sum(self.shares)
        edges = [0, *(unit * total for total in accumulate(self.shares))]
        return edges[self.index], edges[self.index + 1]


class Places:
    """The modules of one model.

    Args:
        source: the model, open.
        family: what it is; None: as its structure tells.

    Raises:
        sdformats.errors.FormatError: the structure tells two families.
    """

    def __init__(self, source: TensorSource, family: str | None = None) -> None:
        self.source = source
        seen = detect(source.specs, family=family)
        self.family = family or seen.family
        self._spelling = seen.spelling

    def find(self, path: str) -> Place | None:
        """Return a module's place, or None where the model has none for it."""
        for place in self._candidates(path):
            if place.weight in self.source.specs:
                return place
        return None

    def weight(self, path: str) -> Ref | None:
        """Return a module's weight, to be read; None where the model has none.

        Raises:
            MismatchError: it is stored transposed, which only a text projection is.
        """
        place = self.find(path)
        if place is None:
            return None
        if place.transposed:
            raise MismatchError(f"{self.source.path}: {place.weight!r} is stored transposed")
        stored = Stored(self.source, place.weight)
        found = rows(stored, *place.range_of(stored.shape[0]))
        return halves_swapped(found) if place.swapped else found

    def _candidates(self, path: str) -> Iterator[Place]:
        component, _, rest = path.partition(".")
        if component == "unet":
            yield from self._network(rest)
        else:
            yield from self._text(component, rest)

    def _network(self, rest: str) -> Iterator[Place]:
        if self._spelling != SINGLE_FILE:
            for prefix in ("unet.", "transformer.", ""):
                yield _place(prefix + rest)
        found = self._fused.get(rest) if self._spelling != DIFFUSERS else None
        for prefix in _UNET_PREFIXES:
            if found is not None:
                theirs, index, fusion = found
                name = prefix + theirs
                yield Place(f"{name}.weight", f"{name}.bias", index, fusion.shares, swapped=self._swapped(name, fusion))

    def _swapped(self, module: str, fusion: Rule) -> bool:
        """Whether the halves of a module's rows are the other way round in this model."""
        if not fusion.swapped_alone:
            return fusion.swapped
        spec = self.source.specs.get(f"{module}.weight")
        return spec is not None and len(spec.shape) == 2 and spec.shape[0] == 2 * spec.shape[1]

    @cached_property
    def _fused(self) -> Mapping[str, tuple[str, int, Rule]]:
        """Return the single file's module, and which part of it, by each of ours."""
        if self.family in ("flux", "sd3"):
            table = names.flux() if self.family == "flux" else names.sd3()
        else:
            shallow = self.family in ("sd1", "sd2", "sdxl-refiner")
            table = {theirs: one(ours) for ours, theirs in names.sgm_of_unet(shallow_first=shallow).items()}
        return {path: (theirs, i, fusion) for theirs, fusion in table.items() for i, path in enumerate(fusion.parts)}

    def _text(self, component: str, rest: str) -> Iterator[Place]:
        """Yield where a text encoder's module may be: transformers' names behind some prefix, or OpenCLIP's."""
        prefixes, open_clip = _encoders()[component]
        for prefix in (*prefixes, ""):
            yield _place(prefix + rest)
        # transformers 5 leaves text_model. out of what it saves, too.
        if rest.startswith("text_model."):
            yield from (_place(prefix + rest.removeprefix("text_model.")) for prefix in prefixes)
        for prefix in open_clip:
            yield from _open_clip(prefix, rest)


def _place(module: str) -> Place:
    return Place(f"{module}.weight", f"{module}.bias")


@cache
def _encoders() -> Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the prefixes of each text encoder's tensors, in any family: with transformers' names, and with OpenCLIP's."""
    named = {name: list(_ALSO.get(name, ())) for name in ("te1", "te2", "te3")}
    of_open_clip: dict[str, list[str]] = {name: [] for name in named}
    for part in (part for known in KEY_MAPS.values() for part in known.components):
        name = "te3" if part.table is t5.table else component_of(f"{part.name}.", DIFFUSERS)
        if name in named:
            named[name].append(f"{part.name}.")
            fused = part.table in (clip.open_clip, clip.open_clip_without_its_end)
            (of_open_clip if fused else named)[name] += part.prefixes
    return {name: (tuple(dict.fromkeys(named[name])), tuple(dict.fromkeys(of_open_clip[name]))) for name in named}


@cache
def _of_open_clip() -> Mapping[str, tuple[str, int, Rule]]:
    """Return OpenCLIP's module, and which part of it, by each of ours."""
    table = clip.open_clip_modules(_MOST_LAYERS)
    return {path: (theirs, i, rule) for theirs, rule in table.items() for i, path in enumerate(rule.parts)}


def _open_clip(prefix: str, rest: str) -> Iterator[Place]:
    """Yield OpenCLIP's names: q, k and v are the rows of one tensor, and the text projection is transposed."""
    if rest in _of_open_clip():
        theirs, index, rule = _of_open_clip()[rest]
        ends = {ours: end for end, ours in rule.ends}
        weight, bias = (prefix + theirs + ends.get(end, end) for end in (".weight", ".bias"))
        yield Place(weight, bias, index, rule.shares, transposed=rule.transposed)
