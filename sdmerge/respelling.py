"""Which tensors a conversion writes, under which names; and models of one spelling in a merge of the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdformats.errors import FormatError
from sdformats.keymap import EXTRAS, EXTRAS_FILE, Respelled
from sdformats.layout import DIFFUSERS, SINGLE_FILE, detect
from sdformats.renamed import Renamed, key_map, respelled
from sdformats.views import Stored
from sdmerge.errors import RequestError
from sdmerge.policy import averaged, listing, view
from sdmerge.prediction import MARKERS
from sdmerge.provenance import once_in

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.keymap import Component, KeyMap
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.conversion import Conversion
    from sdmerge.options import Options
    from sdmerge.policy import Notes, View

_ASIDE = ("safety_checker.", "image_encoder.")
"""Components of folders that programs which read single files do without."""


def turned(
    tensors: Mapping[str, Ref],
    source: TensorSource,
    seen: Detection,
    conversion: Conversion,
    options: Options,
    notes: Notes,
) -> Respelled:
    """Return a model's tensors as a conversion asks for them.

    Args:
        tensors: by name, in the spelling that they have.
        source: where they are.
        seen: what they are.
        conversion: the spelling and the part that are wanted.
        options: whether another type is written, in which factors of weights are multiplied.
        notes: takes what is kept aside, and what is left out.

    Raises:
        FormatError: there is no other spelling of it, or it is not what its names say.
        RequestError: something has no place in the other spelling.
    """
    path, to = source.path, conversion.to or seen.spelling
    into_folder = conversion.to == DIFFUSERS and source.container != "folder"
    if conversion.only is None and to == seen.spelling and not into_folder:
        return Respelled(dict(tensors))
    try:
        known = key_map(seen)
        alone = known.components[0].name if seen.kind != "checkpoint" else None
        folder = as_folder(tensors, seen, alone, notes)
        if conversion.only is not None:
            wanted = _wanted(known, conversion.only, seen)
            folder.tensors = _of_components(folder.tensors, wanted, path)
            alone = wanted[0].name if conversion.only != "te" else None
        if to == DIFFUSERS:
            return folder
        made = known.to_single(folder.tensors, alone=alone)
    except FormatError as error:
        error.path = error.path or path
        raise
    _check_left(made, path, conversion, notes)
    for name in set(made.twins) & {*once_in(source.metadata), *folder.twins}:
        del made.tensors[name]
    if made.in_rows and options.output_type is None:
        raise RequestError(
            f"{path}: fp8 weights that are one tensor in a single file have factors that differ "
            f"({listing(made.in_rows)}); choose a type without factors, with --dtype"
        )
    return made


def as_folder(tensors: Mapping[str, Ref], seen: Detection, alone: str | None, notes: Notes) -> Respelled:
    """Return tensors under the names of a folder, ``component.key``.

    Args:
        tensors: by name.
        seen: what they are.
        alone: the component that bare names belong to.
        notes: takes what is kept aside.

    Raises:
        FormatError: there is no other spelling of it, or it is not what its names say.
    """
    if seen.spelling != DIFFUSERS:
        made = respelled(tensors, seen, DIFFUSERS)
        for name in made.kept:
            notes.add(f"diffusers has no place for it, kept in {EXTRAS_FILE}", name)
        return made
    if alone is None or any(name.startswith(f"{alone}.") for name in tensors):
        return Respelled(dict(tensors))
    return Respelled({f"{alone}.{name}": ref for name, ref in tensors.items()})


def _wanted(known: KeyMap, only: str, seen: Detection) -> list[Component]:
    """Return the components that are asked for."""
    sort = {"unet": known.components[:1], "vae": [part for part in known.components if part.name == "vae"]}
    found = list(sort.get(only, [part for part in known.components if part.name.startswith("text_encoder")]))
    if not found:
        raise RequestError(f"--only {only}: there is none in what is {seen.kind}")
    return found


def _of_components(tensors: Mapping[str, Ref], wanted: list[Component], path: Path) -> dict[str, Ref]:
    """Return the tensors of some components, with the extras that belong to them."""
    beginnings = tuple(f"{part.name}." for part in wanted)
    extras = tuple(f"{EXTRAS}.{prefix}" for part in wanted for prefix in part.prefixes)
    markers = [f"{EXTRAS}.{name}" for name in MARKERS] if wanted[0].name in ("unet", "transformer") else []
    found = {name: ref for name, ref in tensors.items() if name.startswith((*beginnings, *extras)) or name in markers}
    if not found:
        raise RequestError(f"{path}: has no {' and no '.join(part.name for part in wanted)}")
    return found


def _check_left(made: Respelled, path: Path, conversion: Conversion, notes: Notes) -> None:
    """Say what a single file has no place for; refuse what only those who ask for it may lose."""
    lost = [name for name in made.left if not name.startswith(_ASIDE)]
    if lost and not conversion.allow_loss:
        raise RequestError(
            f"{path}: a single file has no name for {listing(lost)}; --allow-loss leaves such tensors out"
        )
    for name in made.left:
        notes.add("left out, as a single file has no place for it", name)


def view_alike(
    label: str, source: TensorSource, seen: Detection, spelling: str | None, options: Options, notes: Notes
) -> View:
    """Return what a model offers to a merge of models in `spelling`, whichever it has itself.

    Raises:
        FormatError: its names do not hold what they say.
    """
    apart = {seen.spelling, spelling} == {DIFFUSERS, SINGLE_FILE}
    if not apart or seen.kind not in ("checkpoint", "unet", "vae"):
        return view(label, source, seen, options, notes)
    keys = averaged(label, source.specs, options, notes)
    try:
        made = respelled({name: Stored(source, key) for name, key in keys.items()}, seen, spelling or "")
    except FormatError as error:
        error.path = error.path or source.path
        raise
    notes.add(f"{label} is spelled as {seen.spelling}: its tensors are taken under the names of {spelling}")
    renamed = Renamed(made.tensors, (source,))
    found = detect(renamed.specs, family=seen.family)
    return view(label, renamed, found, replace(options, ema="keep"), notes)
