"""Take models apart into files of one component each, and put such files together, with checks that they fit."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.configs import known
from sdformats.errors import WriteError
from sdformats.keymap import EXTRAS
from sdformats.layout import DIFFUSERS, SINGLE_FILE
from sdformats.layouts import KEY_MAPS
from sdformats.renamed import Renamed, key_map, stored
from sdformats.safetensors import SafetensorsSink
from sdmerge import policy
from sdmerge.checkpoints import configs_of, convert_model
from sdmerge.conversion import Conversion, Given
from sdmerge.errors import FamilyError, RequestError
from sdmerge.execute import FILE_ENDINGS, check_output, no_collection, open_model, report_of, write_plans
from sdmerge.fitting import check_fit, check_replaced, is_open_clip, slot_of
from sdmerge.plan import plan_copy
from sdmerge.provenance import respelled_metadata, said_once
from sdmerge.respelling import as_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdformats.keymap import KeyMap
    from sdformats.layout import Detection
    from sdformats.tensor import Spec, TensorSink, TensorSource
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.options import Options

_PART = "sdmerge.part"
_NETWORKS = ("unet", "transformer")
COMPONENTS = (*_NETWORKS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def split(source: Path, folder: Path, options: Options) -> list[Report]:
    """Write each component of a model into a file of its own, as programs that load components know them.

    The network and the VAE have the names of single files, text encoders those of transformers; what belongs to no component
    is in a file of its own, so that `join` gives the same model again.

    Args:
        source: a model.
        folder: where the files go, each called after its component; made if it is missing.
        options: see `Options`.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written, or is no model.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        with no_collection():
            opened, seen = open_model(stack, source, options)
            if seen.kind != "checkpoint":
                raise RequestError(f"{source}: is {seen.kind}, and cannot be taken apart (expected a whole model)")
            notes = policy.Notes()
            keys = policy.averaged(source.name, opened.specs, options, notes)
            whole = stored(opened)
            made = as_folder({name: whole[key] for name, key in keys.items()}, seen, None, policy.Notes())
            parts = _files(made.tensors, key_map(seen))
            plans = [plan_copy(Renamed(tensors, (opened,)), seen, options, notes) for tensors in parts.values()]
        targets = [folder / f"{name}.safetensors" for name in parts]
        for target, plan in zip(targets, plans, strict=True):
            check_output(target, plan, options, FILE_ENDINGS[:1])
        if options.dry_run:
            return [report_of(plan, target, started) for plan, target in zip(plans, targets, strict=True)]
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot be made: {error.strerror or error}", path=folder) from error
        texts = respelled_metadata(opened) | known.as_metadata(configs_of(opened)) | said_once(made.twins)
        metadata = [{**texts, _PART: name} for name in parts]

        def sink(target: Path, specs: Mapping[str, Spec], inside: Mapping[str, str]) -> TensorSink:
            return SafetensorsSink(target, specs, inside, overwrite=options.overwrite)

        return write_plans(plans, metadata, targets, options, started, "splitting", sink)


def _files(tensors: Mapping[str, Ref], family: KeyMap) -> dict[str, dict[str, Ref]]:
    """Return the tensors of each file, by the names they have there."""
    inside: dict[str, dict[str, Ref]] = {}
    for name, ref in tensors.items():
        component, _, key = name.partition(".")
        inside.setdefault(component, {})[key] = ref
    for component in (*_NETWORKS, "vae"):
        if component in inside:
            inside[component] = family.to_single(inside[component], alone=component).tensors
    return inside


@dataclass(frozen=True)
class _Given:
    """A part as the user named it.

    Attributes:
        component: the only one to take of it; None: all that are in it.
        source: the file.
        seen: what it is.
    """

    component: str | None
    source: TensorSource
    seen: Detection


def join(parts: Sequence[str], output: Path, conversion: Conversion, options: Options) -> Report:
    """Put a model together from models and components; a later part takes the place of what is there.

    Args:
        parts: paths; ``component=path`` takes nothing but this component of a file, or says which text encoder it is.
        output: where to write.
        conversion: how; without a layout, a single file where the name has an ending for one, else a diffusers folder.
        options: see `Options`.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the parts do not fit together, or something is missing.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        with no_collection():
            given = [_opened(stack, part, options) for part in parts]
            base = _base(given)
            found: dict[str, dict[str, Ref]] = {}
            homes: dict[str, Path] = {}
            twins: list[str] = []
            for one in given:
                for component, inside in _taken(one, base, found, options, twins).items():
                    if component in found and component != EXTRAS:
                        check_replaced(component, found[component], inside, one.source.path)
                    found[component] = inside
                    homes[component] = one.source.path
            check_fit(
                {name: {key: ref.spec for key, ref in inside.items()} for name, inside in found.items()}, base, homes
            )
            flat = {f"{name}.{key}": ref for name, inside in found.items() for key, ref in inside.items()}
            model = Renamed(flat, [one.source for one in given])
            texts = {key: text for key, text in model.metadata.items() if key != _PART}
            model.metadata = texts | said_once(twins)
        to = conversion.to or (SINGLE_FILE if output.suffix.lower() in FILE_ENDINGS else DIFFUSERS)
        seen = replace(base, kind="checkpoint", spelling=DIFFUSERS)
        return convert_model(Given(model, seen, started), output, replace(conversion, to=to), options)


def _opened(stack: ExitStack, part: str, options: Options) -> _Given:
    component, equals, path = part.partition("=")
    named = bool(equals) and component in COMPONENTS
    source, seen = open_model(stack, Path(path if named else part), options)
    return _Given(component if named else None, source, seen)


def _base(given: Sequence[_Given]) -> Detection:
    """Return what the model will be: as the first network says.

    Raises:
        RequestError: there is none, or there are two whole models and nothing says what to take of the second.
        FamilyError: the networks are of different families.
    """
    networks = [one for one in given if one.seen.kind in ("checkpoint", "unet")]
    if not networks:
        raise RequestError("there is no network among the parts (expected a model, or a UNet's or transformer's file)")
    base = networks[0].seen
    for one in networks[1:]:
        if one.seen.family != base.family:
            raise FamilyError(
                f"{one.source.path}: is {one.seen.family}, and {networks[0].source.path} is {base.family}; "
                "parts of different families make no model"
            )
        if one.component is None and one.seen.kind == "checkpoint":
            raise RequestError(
                f"{one.source.path}: is a second whole model; say what to take of it, as vae={one.source.path}"
            )
    if base.family not in KEY_MAPS:
        raise FamilyError(f"{networks[0].source.path}: nothing tells its family; give --family")
    return base


def _taken(
    one: _Given, base: Detection, there: Mapping[str, Mapping[str, Ref]], options: Options, twins: list[str]
) -> dict[str, dict[str, Ref]]:
    """Return the components of a part that are to be used, with names as in a folder."""
    source, seen, path = one.source, one.seen, one.source.path
    family = KEY_MAPS[base.family or ""]
    whole = stored(source)
    if source.metadata.get(_PART) == EXTRAS:
        return {EXTRAS: whole}
    if seen.kind == "text-encoder":
        said = one.component or next((name for name in COMPONENTS if name == source.metadata.get(_PART)), None)
        before = {name: _specs(inside) for name, inside in there.items()}
        component = slot_of(source.specs, family, said, before, path)
        made = family.to_folder(whole, alone=component) if is_open_clip(source.specs) else None
        inside = whole if made is None else _component(made.tensors, component)
        return {component: _today(inside, family, component)}
    if seen.kind not in ("checkpoint", "unet", "vae"):
        raise RequestError(f"{path}: is {seen.kind}, which is no part of a model")
    keys = policy.averaged(path.name, source.specs, options, policy.Notes())
    alone = None if seen.kind == "checkpoint" else "vae" if seen.kind == "vae" else family.components[0].name
    turned = as_folder({name: whole[key] for name, key in keys.items()}, seen, alone, policy.Notes())
    found: dict[str, dict[str, Ref]] = {}
    for name, ref in turned.tensors.items():
        component, _, key = name.partition(".")
        found.setdefault(component, {})[key] = ref
    if one.component is not None and one.component not in found:
        raise RequestError(f"{path}: has no {one.component} (expected one of {', '.join(sorted(found))})")
    twins += turned.twins
    wanted = found if one.component is None else {one.component: found[one.component]}
    return {component: _today(inside, family, component) for component, inside in wanted.items()}


def _component(tensors: Mapping[str, Ref], component: str) -> dict[str, Ref]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): ref for name, ref in tensors.items() if name.startswith(prefix)}


def _today(tensors: Mapping[str, Ref], family: KeyMap, component: str) -> dict[str, Ref]:
    """Return a component's tensors under the names that are written today."""
    dialect = next((part.dialect for part in family.components if part.name == component), None)
    return dict(tensors) if dialect is None else {dialect(name): ref for name, ref in tensors.items()}


def _specs(tensors: Mapping[str, Ref]) -> dict[str, Spec]:
    return {name: ref.spec for name, ref in tensors.items()}
