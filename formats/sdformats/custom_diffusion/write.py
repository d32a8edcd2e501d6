"""A delta in each of its forms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.adapters import names
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.custom_diffusion.kind import SGM, TEXT, WORD
from sdformats.folder import CUSTOM_DIFFUSION
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref, joined, reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.custom_diffusion.delta import CustomDiffusion, Product
    from sdformats.torch_pickle import Tree

_SAFE_WORD = re.compile(r"<?\w[\w .-]{0,99}>?")


def write_original(record: CustomDiffusion) -> Written:
    """Return the form of the first implementation, whole or compressed. Words lose their names, which it has no place for.

    Raises:
        CannotHold: there is a text encoder, or a word has several vectors.
    """
    if record.text_encoder:
        raise CannotHold("the layout original has no place for a text encoder", advice="choose --to delta")
    tensors: dict[str, Ref] = {}
    inner: dict[str, Tree] = {}
    theirs = names.sgm_of_unet(shallow_first=True)
    for name, weight in record.weights.items():
        module, _, end = name.rpartition(".")
        _put(tensors, inner, "", f"{SGM}{theirs[module]}.{end}", weight)
    vectors = [vector for one in record.words.values() for vector in one]
    if len(vectors) > len(record.words) or any(vector.spec.numel != vector.shape[-1] for vector in vectors):
        raise CannotHold("the layout original has one vector for each word", advice="choose --to delta")
    if vectors:
        tensors["embed"] = joined([reshaped(vector, (1, vector.shape[-1])) for vector in vectors])
        inner["embed"] = TensorNamed("embed")
    return Written(tensors, record.extras, tree={**record.extras, "state_dict": inner})


def write_delta(record: CustomDiffusion) -> Written:
    """Return the form with diffusers' names, whole or compressed."""
    tensors: dict[str, Ref] = {}
    unet: dict[str, Tree] = {}
    for name, weight in record.weights.items():
        _put(tensors, unet, "unet.", name, weight)
    words: dict[str, Tree] = {}
    for word, vectors in record.words.items():
        several = len(vectors) > 1
        keys = [f"{WORD}{word}.{i}" if several else f"{WORD}{word}" for i in range(len(vectors))]
        tensors |= dict(zip(keys, vectors, strict=True))
        words[word] = [TensorNamed(key) for key in keys] if several else TensorNamed(keys[0])
    tree: dict[str, Tree] = {**record.extras, "unet": unet, "modifier_token": words}
    if record.text_encoder:
        tensors |= {f"{TEXT}{name}": ref for name, ref in record.text_encoder.items()}
        tree["text_encoder"] = {name: TensorNamed(f"{TEXT}{name}") for name in record.text_encoder}
    return Written(tensors, record.extras, tree=tree)


def _put(tensors: dict[str, Ref], tree: dict[str, Tree], prefix: str, name: str, weight: Ref | Product) -> None:
    if isinstance(weight, Ref):
        tensors[prefix + name] = weight
        tree[name] = TensorNamed(prefix + name)
        return
    both = {f"{prefix}{name}.u": weight.up, f"{prefix}{name}.v": weight.down}
    tensors |= both
    tree[name] = {key[-1]: TensorNamed(key) for key in both}


def write_diffusers(record: CustomDiffusion) -> Written:
    """Return the folder that diffusers' trainer writes: weights, and a file for each word.

    Raises:
        CannotHold: weights are compressed, there is a text encoder, or a word is no name for a file.
    """
    if record.compressed:
        raise CannotHold(
            "the layout diffusers holds whole weights, and these are compressed", advice="name the model with --base"
        )
    if record.text_encoder:
        raise CannotHold("the layout diffusers has no place for a text encoder", advice="choose --to delta")
    tensors: dict[str, Ref] = {}
    for name, weight in record.weights.items():
        assert isinstance(weight, Ref), "nothing is compressed"
        attention, _, end = name.partition(".attn2.")
        end = re.sub(r"^(to_\w+?)(\.0)?\.(weight|bias)$", r"\1_custom_diffusion\2.\3", end)
        tensors[f"{CUSTOM_DIFFUSION}.safetensors/{attention}.attn2.processor.{end}"] = weight
    for word, vectors in record.words.items():
        if not _SAFE_WORD.fullmatch(word):
            raise CannotHold(f"the word {word!r} is no name for a file", advice="choose --to delta")
        if len(vectors) > 1:
            raise CannotHold(f"the word {word} has vectors for several text encoders", advice="choose --to delta")
        tensors[f"{word}.safetensors/{word}"] = vectors[0]
    return Written(tensors, record.extras)


WRITERS: Mapping[str, Callable[[CustomDiffusion], Written]] = {
    "original": write_original,
    "delta": write_delta,
    "diffusers": write_diffusers,
}
"""By layout."""
