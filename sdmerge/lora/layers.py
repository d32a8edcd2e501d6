"""The layers that two models of one family both have, and what each changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from sdformats.adapters import names
from sdformats.tensor import DType
from sdformats.views import Stored, rows
from sdmerge.errors import MismatchError, NonFiniteInput
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sdformats.views import Ref
    from sdmerge.lora.places import Place, Places

_STEPS = {DType.F16: 2.0**-10, DType.BF16: 2.0**-7, DType.F32: 2.0**-23, DType.F8_E4M3: 2.0**-3, DType.F8_E5M2: 2.0**-2}
"""The distance of neighbours, as a part of the power of two below them."""
_ROUNDING = 0.541 / 12
"""A rounding error's square is one twelfth of the step's; the step's, for magnitudes spread evenly over logarithms, 0.541 of what
it is at the power of two below."""
_PIECE = 1 << 20
_LOUD = 2.0
"""How much larger than that of rounding a change's squared norm must be to count as one."""


@dataclass(frozen=True)
class Layer:
    """A module of both models.

    Attributes:
        path: its name.
        tuned, base: its weight in each: the rows that are the module, to be read.
        place, base_place: where it is in each; one may be transposed, or have its halves the other way round, and the other not.
    """

    path: str
    tuned: Ref
    base: Ref
    place: Place
    base_place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, (out, in[, kh, kw]) or (channels,)."""
        return _shape(self.tuned, self.place)

    @property
    def is_embedding(self) -> bool:
        """Whether its rows are words or positions: no program puts a LoRA there."""
        return ".embeddings." in self.path or self.path.endswith((".shared", ".relative_attention_bias"))

    @property
    def columns(self) -> int:
        """Inputs times the kernel."""
        return prod(self.shape[1:])

    @property
    def kernel(self) -> int:
        """How many pixels its kernel has; 1 for what is no convolution."""
        return prod(self.shape[2:])

    def change(self, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
        """Read both weights; return what changed, in float32, and how large the rounding of their types alone may make it.

        The second is an expected squared norm: each stored number is off by half a step at most.

        Raises:
            NonFiniteInput: a weight holds NaN or infinity, and so has no singular values.
        """
        refs = (self.tuned, self.base)
        both = [
            _upright(value(ref, device), place) for ref, place in zip(refs, (self.place, self.base_place), strict=True)
        ]
        norms = [squared_norm(weight) for weight in both]
        for ref, norm in zip(refs, norms, strict=True):
            if not math.isfinite(norm):
                stored = next(ref.stored())
                raise NonFiniteInput(
                    f"{stored.source.path}: {stored.key!r}: holds NaN or infinity, which has no singular values; repair the model"
                )
        noise = sum(
            _ROUNDING * _STEPS.get(ref.spec.dtype, 0.0) ** 2 * norm for ref, norm in zip(refs, norms, strict=True)
        )
        return both[0].sub_(both[1]), noise


def _shape(ref: Ref, place: Place) -> tuple[int, ...]:
    return ref.shape[::-1] if place.transposed else ref.shape


def _upright(stored: Tensor, place: Place) -> Tensor:
    """Return a weight or bias as the module has it, in float32."""
    weight = stored.float()
    weight = weight.T if place.transposed else weight
    return weight.roll(weight.shape[0] // 2, 0) if place.swapped else weight


def squared_norm(values: Tensor) -> float:
    """Return Σ x² in float64, in pieces: a copy of the largest layers in float64 would be half a gigabyte."""
    return math.fsum(float(piece.double().square_().sum()) for piece in torch.split(values.reshape(-1), _PIECE))


def is_noise(change: Tensor, noise: float) -> str | None:
    """Say why a change is none: ``unchanged``, or ``rounding``; None where it is one."""
    energy = squared_norm(change)
    if energy == 0:
        return "unchanged"
    return "rounding" if energy < _LOUD * noise else None


def layers_of(tuned: Places, base: Places, *, text_encoders: bool) -> Iterator[Layer]:
    """Yield the modules that both models have, in the order of the tables.

    Raises:
        MismatchError: one has another size in the two.
    """
    for path in _paths(tuned.family, text_encoders=text_encoders):
        one, other = tuned.find(path), base.find(path)
        if one is None or other is None:
            continue
        refs = [_rows(places, place) for places, place in ((tuned, one), (base, other))]
        layer = Layer(path, refs[0], refs[1], one, other)
        if layer.shape != _shape(refs[1], other):
            raise MismatchError(
                f"{one.weight!r}: is {refs[0].spec} in {tuned.source.path.name} and {refs[1].spec} in {base.source.path.name}"
            )
        yield layer


def unpaired(tuned: Places, base: Places, *, text_encoders: bool) -> Iterator[tuple[str, Places]]:
    """Yield the modules that only one of the models has, and which of them."""
    for path in _paths(tuned.family, text_encoders=text_encoders):
        there = [places for places in (tuned, base) if places.find(path) is not None]
        if len(there) == 1:
            yield path, there[0]


def _paths(family: str | None, *, text_encoders: bool) -> Iterator[str]:
    network = names.transformer() if family in ("flux", "sd3") else names.unet()
    yield from (f"unet.{path}" for path in network)
    if text_encoders:
        for component in ("te1", "te2"):
            yield from (f"{component}.{path}" for path in names.clip())
        yield from (f"te3.{path}" for path in names.t5())


def _rows(places: Places, place: Place) -> Ref:
    stored = Stored(places.source, place.weight)
    return stored if place.transposed else rows(stored, *place.range_of(stored.shape[0]))


def bias_of(tuned: Places, base: Places, layer: Layer) -> tuple[Ref, Ref] | None:
    """Return a module's bias in both models, where both have one."""
    other = base.find(layer.path)
    if other is None or layer.place.bias not in tuned.source.specs or other.bias not in base.source.specs:
        return None
    found = []
    for places, place in ((tuned, layer.place), (base, other)):
        stored = Stored(places.source, place.bias)
        found.append(rows(stored, *place.range_of(stored.shape[0])))
    return found[0], found[1]
