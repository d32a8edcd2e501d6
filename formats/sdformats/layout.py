"""What a set of tensors is: kind, family, variant and spelling, by structure.

A `Layout` is a value: a family, a spelling and marks that can be looked for. All its `needs` must hold; of those whose needs
hold, the one with the most marks wins, and a tie is an error that names both. Marks look at which keys there are, how many
blocks, how deep, convolution or linear; never at absolute widths, so a narrow model of SD1's structure is SD1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sdformats.errors import FormatError
from sdformats.kinds import readings_of
from sdformats.rule import count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.kind import Reading
    from sdformats.tensor import Spec

_MARKERS = {"v_pred": "made for v-prediction", "ztsnr": "trained to zero terminal SNR"}
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux")
SINGLE_FILE, DIFFUSERS = "single-file", "diffusers"
_PREFIXES = {
    SINGLE_FILE: ("model.diffusion_model.", "diffusion_model.", ""),
    DIFFUSERS: ("unet.", "transformer.", ""),
}
_ROOTS = {
    SINGLE_FILE: ("input_blocks.", "joint_blocks.", "double_blocks."),
    DIFFUSERS: ("down_blocks.", "transformer_blocks.", "single_transformer_blocks."),
}
_COMPONENTS = {
    SINGLE_FILE: (
        ("unet", ("model.diffusion_model.", "diffusion_model.")),
        ("vae", ("first_stage_model.",)),
        ("te1", ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l.")),
        ("te2", ("conditioner.embedders.1.", "text_encoders.clip_g.")),
        ("te3", ("text_encoders.t5xxl.",)),
        ("ema", ("model_ema.",)),
    ),
    DIFFUSERS: (
        ("unet", ("unet.", "transformer.")),
        ("vae", ("vae.",)),
        ("te1", ("text_encoder.",)),
        ("te2", ("text_encoder_2.",)),
        ("te3", ("text_encoder_3.",)),
        ("safety_checker", ("safety_checker.",)),
        ("image_encoder", ("image_encoder.",)),
    ),
}


class Facts:
    """The network's tensors without their prefix, and the questions that marks ask.

    Args:
        specs: every tensor of the source.
        spelling: how the network's blocks are called.
    """

    def __init__(self, specs: Mapping[str, Spec], spelling: str) -> None:
        self.specs = specs
        self.spelling = spelling

    @cached_property
    def prefix(self) -> str | None:
        """What stands before the network's names; None where there is no network in this spelling."""
        for prefix in _PREFIXES[self.spelling]:
            roots = tuple(prefix + root for root in _ROOTS[self.spelling])
            if any(name.startswith(roots) for name in self.specs):
                return prefix
        return None

    @cached_property
    def network(self) -> dict[str, Spec]:
        """The network's tensors by bare name."""
        prefix = self.prefix
        if prefix is None:
            return {}
        cut = len(prefix)
        return {name[cut:]: spec for name, spec in self.specs.items() if name.startswith(prefix)}

    def has(self, pattern: str) -> bool:
        """Whether a bare name of the network begins with the pattern."""
        seek = re.compile(pattern)
        return any(seek.match(name) for name in self.network)

    def holds(self, prefix: str) -> bool:
        """Whether any name of the source begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.specs)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group captures; 0 where it never matches.

        Numbers too long to count blocks are passed over: a hostile name may have thousands of digits.
        """
        return count(self.network, pattern)

    def rank(self, pattern: str) -> int | None:
        """The number of dimensions of the first tensor that the pattern matches."""
        seek = re.compile(pattern)
        return next((len(spec.shape) for name, spec in self.network.items() if seek.match(name)), None)

    def width(self, name: str, axis: int = 1) -> int | None:
        """The size of one axis of a tensor of the network."""
        spec = self.network.get(name)
        return spec.shape[axis] if spec is not None and len(spec.shape) > axis else None


@dataclass(frozen=True)
class Layout:
    """How one family is spelled.

    Attributes:
        needs: must all hold.
        marks: speak for it where they hold.
        variant: tells the variant from the facts.
    """

    family: str
    spelling: str
    needs: tuple[Callable[[Facts], bool], ...]
    marks: tuple[Callable[[Facts], bool], ...]
    variant: Callable[[Facts], str]

    def score(self, facts: Facts) -> int:
        """The number of marks that hold; 0 where a need does not."""
        if not all(need(facts) for need in self.needs):
            return 0
        return len(self.needs) + sum(mark(facts) for mark in self.marks)


@dataclass(frozen=True)
class Detection:
    """What a set of tensors is.

    Attributes:
        kind: checkpoint, unet, vae, text-encoder, one of the names of `kinds.KINDS`, ``ambiguous`` where several of these fit
            equally well, or ``other``.
        family: one of `FAMILIES`, or None where nothing tells.
        variant: base, inpainting, pix2pix and the like; None without a family.
        spelling: ``single-file`` or ``diffusers``, or the layout of what is no model of its own; None where nothing tells.
        components: which parts of a model it holds.
        warnings: what a user should know.
        readings: what it may be, where it is no model of its own; more than one where it is ambiguous.
    """

    kind: str
    family: str | None = None
    variant: str | None = None
    spelling: str | None = None
    components: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    readings: tuple[Reading, ...] = ()


def detect(
    specs: Mapping[str, Spec],
    *,
    metadata: Mapping[str, str] | None = None,
    family: str | None = None,
    kind: str | None = None,
) -> Detection:
    """Say what a set of tensors is.

    Args:
        specs: every tensor by name.
        metadata: the texts beside them.
        family: overrides what the structure tells.
        kind: which reading to take where several fit.

    Raises:
        FormatError: two layouts fit equally well, `family` is none that exists, or it is nothing of this `kind`.
    """
    if family is not None and family not in FAMILIES:
        raise FormatError(f"{family!r} is no family", expected=f"one of {', '.join(FAMILIES)}")
    if not specs:
        return Detection("other", family, warnings=("there is no tensor in it",))
    readings = readings_of(specs, metadata or {})
    if kind is not None:
        readings = _of_kind(readings, kind)
    if readings:
        return _without_model(readings, family)
    facts = {spelling: Facts(specs, spelling) for spelling in (SINGLE_FILE, DIFFUSERS)}
    layout = _best(facts, family)
    if layout is None:
        return _without_network(specs, family)
    components = _components(specs, layout.spelling)
    if "unet" not in components:
        components = ("unet", *components)
    whole = any(part in components for part in ("vae", "te1", "te2", "te3"))
    return Detection(
        kind="checkpoint" if whole else "unet",
        family=family or layout.family,
        variant=layout.variant(facts[layout.spelling]),
        spelling=layout.spelling,
        components=components,
        warnings=tuple(f"has the key {key}: {said}" for key, said in _MARKERS.items() if key in specs),
    )


def _best(facts: Mapping[str, Facts], family: str | None) -> Layout | None:
    """Return the layout with the most marks; None where no network is seen.

    Args:
        facts: by spelling.
        family: decides between layouts that fit equally well.

    Raises:
        FormatError: several fit equally well.
    """
    from sdformats.layouts import LAYOUTS  # layouts are made of this module's classes

    scores = [(layout.score(facts[layout.spelling]), layout) for layout in LAYOUTS]
    best = max(score for score, _ in scores)
    if best == 0:
        return None
    winners = [layout for score, layout in scores if score == best]
    if len(winners) > 1 and family is not None:
        winners = [layout for layout in winners if layout.family == family] or winners[:1]
    if len(winners) > 1:
        names = " and ".join(f"{w.family} ({w.spelling})" for w in winners)
        mixed = len({w.family for w in winners}) == 1
        advice = (
            "it holds names of both spellings, which belongs into two files" if mixed else "say which with --family"
        )
        raise FormatError(f"could be {names}", advice=advice)
    return winners[0]


def _of_kind(readings: tuple[Reading, ...], kind: str) -> tuple[Reading, ...]:
    """Return the reading that was asked for."""
    found = tuple(reading for reading in readings if reading.kind == kind)
    if not found:
        expected = " or ".join(reading.kind for reading in readings) or "none of the kinds that are no model"
        raise FormatError(f"cannot be read as {kind}", expected=expected)
    return found


def _without_model(readings: tuple[Reading, ...], family: str | None) -> Detection:
    """Say what is no model of its own; where several readings fit, that they do."""
    if len(readings) == 1:
        (reading,) = readings
        return Detection(reading.kind, family or reading.family, spelling=reading.layout, readings=readings)
    families = {reading.family for reading in readings}
    common = next(iter(families)) if len(families) == 1 else None
    names = "|".join(reading.kind for reading in readings)
    warning = f"could be {' or '.join(reading.title for reading in readings)}: say which with --as {names}"
    return Detection("ambiguous", family or common, warnings=(warning,), readings=readings)


def component_of(name: str, spelling: str | None) -> str:
    """Return the part of a model that a tensor belongs to: unet, vae, te1, te2, te3, ema, …, or other."""
    for component, prefixes in _COMPONENTS.get(spelling or "", ()):
        if name.startswith(prefixes):
            return component
    return "other"


def _components(specs: Mapping[str, Spec], spelling: str) -> tuple[str, ...]:
    there = {component_of(name, spelling) for name in specs} - {"other"}
    return tuple(component for component, _ in _COMPONENTS[spelling] if component in there)


def _without_network(specs: Mapping[str, Spec], family: str | None) -> Detection:
    """Tell a VAE or a text encoder alone; what is left is other."""
    names = [name.removeprefix("first_stage_model.").removeprefix("vae.") for name in specs]
    if any(name.startswith("decoder.up_blocks.") for name in names):
        return Detection("vae", family, spelling=DIFFUSERS, components=("vae",))
    if any(name.startswith(("decoder.up.", "encoder.down.")) for name in names):
        return Detection("vae", family, spelling=SINGLE_FILE, components=("vae",))
    if any(re.search(r"(^|\.)(text_model\.encoder|transformer\.resblocks)\.", name) for name in specs):
        spelling = SINGLE_FILE if any(n.startswith(("cond_stage_model.", "conditioner.")) for n in specs) else DIFFUSERS
        return Detection("text-encoder", family, spelling=spelling, components=("te1",))
    if any(re.match(r"(encoder\.block\.\d|encoder\.layers\.\d|shared\.weight$)", name) for name in specs):
        return Detection("text-encoder", family, spelling=DIFFUSERS, components=("te1",))
    return Detection("other", family)
