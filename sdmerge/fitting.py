"""Whether components make one model: that all are there, that their widths fit, which text encoder is which."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdmerge.errors import MismatchError, RequestError
from sdmerge.policy import listing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.keymap import Component, KeyMap
    from sdformats.layout import Detection
    from sdformats.tensor import Spec
    from sdformats.views import Ref

    Specs = Mapping[str, Spec]

_OPEN_CLIP = re.compile(r"(.*\.)?transformer\.resblocks\.")
_T5 = re.compile(r"encoder\.block\.\d")
_CROSS_KEY = re.compile(r".*\.attn2\.to_k\.weight")
_LAST_NORMS = ("text_model.final_layer_norm", "final_layer_norm", "ln_final", "encoder.final_layer_norm")
_MAY_LACK = {"sd3": ("text_encoder_3",)}
"""Components without which a family's models are complete."""


def is_open_clip(specs: Specs) -> bool:
    """Whether a text encoder has OpenCLIP's names."""
    return any(_OPEN_CLIP.match(name) for name in specs)


def slot_of(specs: Specs, known: KeyMap, said: str | None, there: Mapping[str, Specs], path: Path) -> str:
    """Return which of a family's text encoders a file of one is.

    Args:
        specs: its tensors, by bare names.
        known: the family's components.
        said: the component that the user says it is.
        there: the components that there are already: an encoder of one's width takes its place.
        path: the file, for errors.

    Raises:
        RequestError: it may be several, or is none.
    """
    slots = [part for part in known.components if part.name.startswith("text_encoder")]
    t5 = any(_T5.match(name) for name in specs)
    fits = [part.name for part in slots if (part.twin is not None) is t5]
    if said is not None:
        if said not in fits:
            raise RequestError(f"{path}: cannot be {said} (expected one of {', '.join(fits) or 'none'})")
        return said
    width = _width(specs)
    alike = [name for name in fits if name in there and _width(there[name]) == width]
    projected = any(name.startswith("text_projection") for name in specs)
    told = alike or _by_projection([part for part in slots if part.name in fits], projected=projected)
    if len(told) != 1:
        choice = " or ".join(f"{name}={path.name}" for name in fits) or "none of this kind in the family"
        raise RequestError(f"{path}: may be several text encoders; say which it is: {choice}")
    return told[0]


def _by_projection(slots: list[Component], *, projected: bool) -> list[str]:
    """Return those of CLIP's encoders that have a projection, or have none, as their table says; in SD3 both may have one."""
    if len(slots) < 2 or any(part.identity is not None for part in slots):
        return [part.name for part in slots]
    return [part.name for part in slots if _has_projection(part) is projected]


def _has_projection(part: Component) -> bool:
    return any("text_projection" in rule.parts for rule in part.table(()).values())


def check_replaced(component: str, old: Mapping[str, Ref], new: Mapping[str, Ref], path: Path) -> None:
    """Refuse a component that is not built as the one whose place it takes.

    Raises:
        MismatchError: a tensor is missing, or has another shape.
    """
    lacking = sorted(old.keys() - new.keys())
    if lacking:
        raise MismatchError(f"{path}: its {component} has no {listing(lacking)}, which the one it replaces has")
    for name, ref in old.items():
        if new[name].shape != ref.shape:
            raise MismatchError(
                f"{path}: its {component}'s {name} is {list(new[name].shape)} (expected {list(ref.shape)})"
            )


def check_fit(parts: Mapping[str, Specs], seen: Detection, homes: Mapping[str, Path]) -> None:
    """Refuse components that are no model together.

    Args:
        parts: tensors by component, under the names of a folder.
        seen: what the network is.
        homes: where each component is from, for errors.

    Raises:
        MismatchError: a component is missing, or a width does not fit.
    """
    from sdformats.layouts import KEY_MAPS

    family = seen.family or ""
    for part in KEY_MAPS[family].components:
        if part.name not in parts and part.name not in _MAY_LACK.get(family, ()):
            raise MismatchError(f"the parts have no {part.name}, which a {family} model needs")
    network = parts["unet"] if "unet" in parts else parts["transformer"]
    _agree("text", _text_width(family, network), _text_of(family, parts), homes)
    channels = _size(parts["vae"], "decoder.conv_in.weight", 1)
    _agree("latents", _latents(family, network), channels, homes)


def _agree(what: str, wanted: int | None, found: int | None, homes: Mapping[str, Path]) -> None:
    if wanted is None or found is None or wanted == found:
        return
    files = ", ".join(f"{name} of {path.name}" for name, path in homes.items() if name != "sdmerge_extras")
    raise MismatchError(f"the network is made for {what} of width {wanted}, and the other parts have {found} ({files})")


def _text_width(family: str, network: Specs) -> int | None:
    """Return the width of the text that a network reads."""
    if family in ("sd3", "flux"):
        return _size(network, "context_embedder.weight", 1)
    key = next((name for name in network if _CROSS_KEY.fullmatch(name)), "")
    return _size(network, key, 1)


def _text_of(family: str, parts: Mapping[str, Specs]) -> int | None:
    """Return the width of the text that the encoders put out together."""
    if family in ("sd3", "flux"):
        return _width(parts.get("text_encoder_3" if family == "sd3" else "text_encoder_2", {}))
    widths = [_width(specs) for name, specs in parts.items() if name.startswith("text_encoder")]
    return None if None in widths else sum(width or 0 for width in widths)


def _latents(family: str, network: Specs) -> int | None:
    """Return how many channels the latents have that a network puts out."""
    if family not in ("sd3", "flux"):
        return _size(network, "conv_out.weight", 0)
    rows = _size(network, "proj_out.weight", 0)
    patch = (_size(network, "pos_embed.proj.weight", 2) or 1) if family == "sd3" else 2
    return None if rows is None else rows // patch**2


def _width(specs: Specs) -> int | None:
    """Return the width of a text encoder."""
    found = (_size(specs, f"{name}.weight", 0) for name in _LAST_NORMS)
    return next((size for size in found if size is not None), None)


def _size(specs: Specs, name: str, axis: int) -> int | None:
    spec = specs.get(name)
    return spec.shape[axis] if spec is not None and len(spec.shape) > axis else None
