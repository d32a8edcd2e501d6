"""Which tensors of a model make up one attention, told from their names, in every spelling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

Q, K, V, OUT = range(4)
"""The parts of an attention: queries, keys, values, output."""

_VAE_BLOCK = re.compile(r"(.*\.attentions\.\d+)\.(.+)")
_SPELLINGS = (
    ("unet", re.compile(r"(.*\.attn[12])\.(.+)"), ("to_q", "to_k", "to_v", "to_out.0")),
    ("vae", re.compile(r"(.*\bmid\.attn_1)\.(.+)"), ("q", "k", "v", "proj_out")),
    ("vae", _VAE_BLOCK, ("to_q", "to_k", "to_v", "to_out.0")),
    ("vae", _VAE_BLOCK, ("query", "key", "value", "proj_attn")),
    ("text", re.compile(r"(.*\bself_attn)\.(.+)"), ("q_proj", "k_proj", "v_proj", "out_proj")),
    ("text", re.compile(r"(.*\.SelfAttention)\.(.+)"), ("q", "k", "v", "o")),
)
_FUSED = re.compile(r"(.*\.attn)\.(?:in_proj_weight|in_proj_bias|out_proj\.weight)")
_BETWEEN = ("norm_q", "q_norm")
"""What stands between projection and product where queries and keys are more than linear."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The tensors of one attention.

    Attributes:
        kind: of what: "unet", "vae" or "text".
        weights: the names of the four parts' weights; of a fused one, the first three are the same.
        biases: those of queries, keys and values, where the model has them.
    """

    kind: str
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values are rows of one weight."""
        return self.weights[Q] == self.weights[V]

    def parts(self, name: str) -> tuple[int, ...]:
        """Return which parts a tensor holds."""
        return tuple(part for part in range(4) if name in self.names(part))

    def needed(self, name: str) -> tuple[int, ...]:
        """Return the parts that a tensor holds, and those that they work with."""
        return tuple(sorted({partner for part in self.parts(name) for partner in partners(part)}))

    def names(self, part: int) -> tuple[str, ...]:
        """Return a part's weight, and its bias where it has one; the output's does not count."""
        bias = None if part == OUT else self.biases[part]
        return (self.weights[part],) if bias is None else (self.weights[part], bias)


def partners(part: int) -> tuple[int, int]:
    """Return the two parts whose product an attention depends on: queries and keys, or values and output."""
    return (Q, K) if part in (Q, K) else (V, OUT)


def find(name: str, names: Collection[str]) -> Attention | None:
    """Return the attention that a tensor is a part of.

    Attentions of two streams (SD3, Flux), and those that normalise or turn queries and keys, are none: there is more
    between these than a product.

    Args:
        name: the tensor's.
        names: all of the model, or at least those of the attention.

    Returns:
        None where it is a part of none, or the part that it works with is missing.
    """
    for kind, pattern, parts in _SPELLINGS:
        match = pattern.fullmatch(name)
        if match and match[2].rpartition(".")[0] in parts:
            if any(f"{match[1]}.{norm}.weight" in names for norm in _BETWEEN):
                return None
            weights = tuple(f"{match[1]}.{part}.weight" for part in parts)
            return _complete(kind, weights, name, names)
    if match := _FUSED.fullmatch(name):
        weight = f"{match[1]}.in_proj_weight"
        return _complete("text", (weight, weight, weight, f"{match[1]}.out_proj.weight"), name, names)
    return None


def _complete(kind: str, weights: tuple[str, ...], name: str, names: Collection[str]) -> Attention | None:
    biases = (weight.removesuffix("weight") + "bias" for weight in weights[:OUT])
    found = Attention(kind, weights, tuple(bias if bias in names else None for bias in biases))
    parts = found.needed(name)
    return found if parts and all(weights[part] in names for part in parts) else None


def siblings(name: str, names: Collection[str]) -> tuple[str, ...] | None:
    """Return the tensors that a part of an attention must be seen with, to keep what the attention does; None for others."""
    found = find(name, names)
    if found is None:
        return None
    return tuple(dict.fromkeys(one for part in found.needed(name) for one in found.names(part) if one != name))
