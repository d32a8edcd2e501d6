"""What a delta says, read from any of its forms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.adapters import names
from sdformats.custom_diffusion.kind import MODULE, SGM, TEXT, WORD
from sdformats.errors import CorruptFile
from sdformats.views import Ref, Stored, reshaped, rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import TensorSource


@dataclass(frozen=True)
class Product:
    """What is added to a weight, as factors: up (out, r), down (r, in)."""

    up: Ref
    down: Ref

    @property
    def rank(self) -> int:
        """How many columns `up` has."""
        return self.down.shape[0]


@dataclass(frozen=True)
class CustomDiffusion:
    """Everything that a file says.

    Attributes:
        weights: by diffusers' name of the tensor (``….attn2.to_k.weight``): the new one, or what is added.
        words: vectors of a word, one for each text encoder, by the word.
        text_encoder: a whole text encoder that was trained too, by transformers' names.
        extras: other texts.
        notes: what a user should know about how it was read.
    """

    weights: Mapping[str, Ref | Product]
    words: Mapping[str, tuple[Ref, ...]] = field(default_factory=dict)
    text_encoder: Mapping[str, Ref] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def compressed(self) -> bool:
        """Whether there are products among the weights."""
        return any(isinstance(one, Product) for one in self.weights.values())


def read_custom_diffusion(source: TensorSource) -> CustomDiffusion:
    """Read a delta in any of its forms, but for its weights.

    Raises:
        CorruptFile: a name is none of its form's, factors do not fit, or a word has no vector.
    """
    whole: dict[str, Ref] = {}
    factors: dict[str, dict[str, Ref]] = {}
    words: dict[str, list[Ref]] = {}
    text_encoder: dict[str, Ref] = {}
    notes = list(source.notes)
    for key in source.specs:
        ref = Stored(source, key)
        if key == "embed":
            words |= {word: [vector] for word, vector in _numbered(ref)}
            notes.append(f"its {len(words)} words have no names in it; they are called {', '.join(words)}")
        elif key.startswith(WORD):
            words.setdefault(_word_of(key), []).append(ref)
        elif key.startswith(TEXT):
            text_encoder[key.removeprefix(TEXT)] = ref
        elif key.endswith((".u", ".v")):
            factors.setdefault(_ours(key[:-2], source), {})[key[-1]] = ref
        else:
            whole[_ours(key, source)] = ref
    weights: dict[str, Ref | Product] = dict(whole)
    for name, pair in factors.items():
        weights[name] = _product(name, pair, source)
    extras = {key: text for key, text in source.metadata.items() if key != "format"}
    found = {word: tuple(vectors) for word, vectors in words.items()}
    return CustomDiffusion(weights, found, text_encoder, extras, tuple(notes))


def _numbered(ref: Ref) -> list[tuple[str, Ref]]:
    """Return each row under the name that is usual for it."""
    if len(ref.shape) != 2:
        raise CorruptFile(f"is {ref.spec}", key=str(ref), expected="a vector for each word, [n, width]")
    width = ref.shape[1]
    return [(f"<new{i + 1}>", reshaped(rows(ref, i, i + 1), (width,))) for i in range(ref.shape[0])]


def _word_of(key: str) -> str:
    """Return the word of ``modifier_token.<new1>``, or of ``modifier_token.<new1>.0`` where there are several encoders."""
    word = key.removeprefix(WORD)
    return word[:-2] if re.search(r">\.\d$", word) else word


def _ours(key: str, source: TensorSource) -> str:
    """Return diffusers' name of a weight.

    Raises:
        CorruptFile: it is no cross-attention of a UNet.
    """
    module, _, end = key.rpartition(".")
    if key.startswith(SGM):
        found = names.unet_sgm().get(module.removeprefix(SGM))
    else:
        module = module.removeprefix("unet.")
        module = re.sub(r"\.processor\.to_([kvq])_custom_diffusion$", r".to_\1", module)
        found = re.sub(r"\.processor\.to_out_custom_diffusion\.0$", ".to_out.0", module)
    if found is None or not re.search(rf"(^|\.){MODULE}$", f"{found}.{end}"):
        raise CorruptFile("is no weight of a cross-attention", path=source.path, key=key)
    return f"{found}.{end}"


def _product(name: str, pair: Mapping[str, Ref], source: TensorSource) -> Product:
    up, down = pair.get("u"), pair.get("v")
    if up is None or down is None:
        raise CorruptFile("has only one of its factors u and v", path=source.path, key=name)
    if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0]:
        raise CorruptFile(f"has factors of {up.spec} and {down.spec}", path=source.path, key=name,
                          expected="[out, r] and [r, in]")  # fmt: skip
    return Product(up, down)


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON.

    Raises:
        See `read_custom_diffusion`.
    """
    record = read_custom_diffusion(source)
    ranks = [one.rank for one in record.weights.values() if isinstance(one, Product)]
    trained = {name.partition(".attn2.")[2].removesuffix(".weight") for name in record.weights}
    return {
        "modules": len(record.weights),
        "trained": sorted(trained),
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "words": {word: [vector.shape[-1] for vector in vectors] for word, vectors in record.words.items()},
        "text_encoder": len(record.text_encoder),
    }
