"""Methods that change several tensors of one model together, so that what they compute together stays."""

from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.attention import OUT, Attention, find, partners, siblings
from sdmerge.errors import RequestError
from sdmerge.method import Param, Place, method

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_EIGHT_HEADS = "sd1"
"""The family whose UNet has eight heads of any width; since then it is heads of 64."""
_HEAD = 64
_LEAST = 1e-10
"""Of the largest eigenvalue of a matrix: what is smaller counts as this."""


@method(elementwise=False, siblings=siblings)
def balance_attention(
    a: "Tensor",
    *,
    beside: "Sequence[Mapping[str, Tensor]]",
    place: Place,
    alpha: Annotated[float, Param("how far energy is moved: 0 not at all, 0.5 to a balance, 1 exchanged", 0, 1)] = 0.5,
    heads: Annotated[int, Param("heads of every attention; 0: those of the published models", 0)] = 0,
) -> "Tensor":
    """Even out the energy of queries and keys, and of values and output, without changing what the attention does.

    An attention depends on QᵀK alone, head by head: S Q and S⁻¹ K do the same for any invertible S. The S here leads from
    one to the other on the shortest way, so that at α = 0.5 both have the same energy, (SQ)(SQ)ᵀ = (S⁻¹K)(S⁻¹K)ᵀ; likewise
    for values and output. Biases of queries, keys and values count as a column.

    UNets, VAEs, CLIP and T5 are balanced, in every spelling; all other tensors are A's, and so is a head without energy.
    Attentions that normalise or turn queries and keys, and those of two streams (SD3, Flux), stay as they are: there S would
    show. sd-mecha's method of this name is α = 1: it gives queries the energy that keys had, and the other way round.

    Formula: Q' = S Q, K' = S⁻¹ K, S = M^α, M = QQᵀ⁻¹ # KKᵀ (geometric mean); the same for V and outᵀ
    Source: Bhatia 2007, "Positive definite matrices", chapter 4 (the mean); sd-mecha (balance_attention)

    Args:
        a: a tensor of the model.
        beside: the others of its attention, by name.
        place: the tensor's name, and the model's family.
        alpha: the α of the formula.
        heads: where a VAE's attention has one head and a text encoder's another number, a number that both have as a
            multiple changes nothing either: parts of a head are balanced then.

    Raises:
        RequestError: the rows do not divide into that many heads.
    """
    tensors = {**beside[0], place.name: a}
    found = find(place.name, tensors)
    if found is None or alpha == 0:
        return a.clone()
    made = {}
    for part in found.parts(place.name):
        first, second = (_matrix(found, tensors, one) for one in partners(part))
        count = heads or _published_heads(found, place, first.shape[0])
        if first.shape[0] % count:
            raise RequestError(f"{place.name!r}: has {first.shape[0]} rows, which are not {count} heads; change heads")
        made[part] = _balanced(first, second, count, alpha)[partners(part).index(part)]
    return _stored(found, made, place.name, a)


def _published_heads(found: Attention, place: Place, width: int) -> int:
    if found.kind == "vae":
        return 1
    if found.kind == "unet" and place.family == _EIGHT_HEADS:
        return 8
    if width % _HEAD or (found.kind == "unet" and place.family is None):
        raise RequestError(f"{place.name!r}: the number of heads is not known; give it with -p heads=N")
    return width // _HEAD


def _matrix(found: Attention, tensors: "Mapping[str, Tensor]", part: int) -> "Tensor":
    """Return a part in float64, a row for each of the heads' channels, with its bias as the last column."""
    import torch

    weight, *bias = (tensors[name].double() for name in found.names(part))
    if part == OUT:
        return weight.flatten(1).T
    if found.fused:
        weight, *bias = (x.chunk(3)[part] for x in (weight, *bias))
    return torch.cat([weight.flatten(1), *(x[:, None] for x in bias)], 1)


def _balanced(first: "Tensor", second: "Tensor", heads: int, alpha: float) -> "tuple[Tensor, Tensor]":
    """Return S · first and S⁻¹ · second, head by head."""
    import torch

    parts = [x.reshape(heads, -1, x.shape[1]) for x in (first, second)]
    grams = [x @ x.mT for x in parts]
    if not all(bool(gram.isfinite().all()) for gram in grams):
        return first * torch.nan, second * torch.nan
    there = (grams[0].diagonal(dim1=1, dim2=2).sum(1) > 0) & (grams[1].diagonal(dim1=1, dim2=2).sum(1) > 0)
    eye = torch.eye(grams[0].shape[1], dtype=first.dtype, device=first.device)
    grams = [torch.where(there[:, None, None], gram, eye) for gram in grams]
    half, less = _power(grams[0], 0.5), _power(grams[0], -0.5)
    mean = less @ _power(half @ grams[1] @ half, 0.5) @ less
    turned = [(_power(mean, sign * alpha) @ x).flatten(0, 1) for sign, x in zip((1, -1), parts, strict=True)]
    return turned[0], turned[1]


def _power(x: "Tensor", exponent: float) -> "Tensor":
    """Return symmetric matrices to a power, by their eigenvalues."""
    import torch

    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    values = values.clamp(min=_LEAST * values[:, -1:])
    result: Tensor = (vectors * values.pow(exponent)[:, None, :]) @ vectors.mT
    return result


def _stored(found: Attention, made: "Mapping[int, Tensor]", name: str, like: "Tensor") -> "Tensor":
    """Return a tensor as the model has it."""
    import torch

    bias = name not in found.weights
    columns = torch.cat([made[part] for part in sorted(made)])
    if OUT in made:
        columns = columns.T
    elif len(found.names(min(made))) > 1:
        columns = columns[:, -1] if bias else columns[:, :-1]
    return columns.reshape(like.shape).to(sdkernels.cast.accumulator(like.dtype))
