"""Methods that take some of A and some of B: low and high frequencies, regions, ranks, random elements."""

import math
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, Place, method

if TYPE_CHECKING:
    from torch import Tensor


@method(elementwise=False)
def crossover(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: Annotated[
        float, Param("share of the frequencies that B gives, from the highest down", 0, 1, weight=True)
    ] = 0.5,
    tilt: Annotated[float, Param("0 a sharp cut, 1 a weighted sum, 2 a sharp cut from below", 0, 4)] = 0.0,
) -> "Tensor":
    """Low frequencies of A, high frequencies of B, in as many dimensions as the tensor has. Exactly A where A = B.

    The filter is a line over the distance from frequency 0 (root mean square over the axes, 0 to 1), turned by `tilt` and
    slid so that it passes through (α, 1 − α).

    Formula: irfftn((1 − f) rfftn(A) + f rfftn(B))
    Source: sd-mecha (crossover)

    Args:
        a, b: tensors of one shape.
        alpha: 0 gives A, 1 gives B.
        tilt: in quarter turns; 4 is 0 again.
    """
    import torch

    if alpha in (0, 1):
        return (b if alpha else a).clone()
    if tilt == 1 or not a.dim() or not a.numel() or torch.equal(a, b):
        return a.lerp(b, alpha)
    mine, theirs = torch.fft.rfftn(a), torch.fft.rfftn(b)
    share = _filter(mine.shape, alpha, tilt % 4).to(a)
    mixed: Tensor = torch.fft.irfftn(mine + share * (theirs - mine), s=a.shape)
    return mixed


def _filter(shape: tuple[int, ...], alpha: float, tilt: float) -> "Tensor":
    """Return B's share of each frequency."""
    import torch

    ways = []
    for axis, size in enumerate(shape):
        if axis == len(shape) - 1 or size == 1:
            ways.append(torch.linspace(0, 1, size))
        else:  # the second half of such an axis holds the negative frequencies
            up = torch.linspace(0, (size - 1) // 2, size - size // 2)
            ways.append(torch.cat([up, torch.linspace(size // 2, 1, size // 2)]) / (size // 2))
    squares = torch.stack(torch.meshgrid(*(way**2 for way in ways), indexing="ij"))
    distance = ways[0] if len(shape) == 1 else (squares.sum(0) / len(shape)).sqrt()
    turned = tilt > 2
    cut = 1 - alpha if turned else alpha
    if tilt < 1e-10:
        share = (distance > 1 - cut).float()
    elif abs(tilt - 2) < 1e-10:
        share = (distance < 1 - cut).float()
    else:
        slope = 1 / math.tan(math.pi * tilt / 2)
        rises = tilt <= 1 or 2 < tilt <= 3
        share = (distance + cut - 1 if rises else distance - cut) * slope + cut
        share = share.clip(0, 1)
    return 1 - share if turned else share


@method(elementwise=False)
def distribution_crossover(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("where the cut lies: A below it, B above", 0, 1, weight=True)] = 0.5,
    tilt: Annotated[float, Param("width of the passage between them; 0 is a sharp cut", 0)] = 0.0,
) -> "Tensor":
    """Put A and B in the order of C's values, and take A's low frequencies and B's high ones. Exactly A where A = B.

    Formula: irfft((1 − f) rfft(A[π]) + f rfft(B[π])) in C's order π; f = clip((k/n − α) / tilt + ½, 0, 1), or k/n ≥ α
    Source: meh, SD.Next (distribution_crossover)

    Args:
        a, b, c: tensors of one shape.
        alpha: 1 gives A, 0 gives B.
        tilt: in shares of all frequencies.
    """
    import torch

    if not a.dim() or not a.numel():
        return b.lerp(a, alpha)
    if torch.equal(a, b):
        return a.clone()
    order = c.flatten().argsort(stable=True)
    mine, theirs = (torch.fft.rfft(x.flatten()[order]) for x in (a, b))
    at = torch.arange(mine.numel(), device=a.device).to(a.dtype) / mine.numel()
    share = ((at - alpha) / tilt + 0.5).clamp_(0, 1) if tilt > 1e-10 else (at >= alpha).to(a.dtype)
    mixed = torch.fft.irfft(mine + share * (theirs - mine), n=a.numel())
    return torch.empty_like(mixed).scatter_(0, order, mixed).reshape(a.shape)


_WIDTH = Param("share that comes from B; negative counts backwards", weight=True)
_OFFSET = Param("where that share begins", weight=True)


@method(elementwise=False)
def tensor_sum(
    a: "Tensor",
    b: "Tensor",
    *,
    width: Annotated[float, _WIDTH] = 0.5,
    offset: Annotated[float, _OFFSET] = 0.0,
) -> "Tensor":
    """Take a run of rows (first axis) from B, the others from A. The run goes round the end.

    Formula: B[i] for ⌊offset · n⌉ ≤ i < ⌊(offset + width) · n⌉ (mod n), else A[i]
    Source: supermerger (tensor sum), meh, SD.Next, Chattiori; sd-mecha (tensor_sum)

    Args:
        a, b: tensors of one shape. Of a single number B's is taken where width > ½.
        width, offset: in shares of the rows.
    """
    if not a.dim():
        return (b if width > 0.5 else a).clone()
    start, end, outside = _region(width, offset, a.shape[0])
    result = (b if outside else a).clone()
    result[start:end] = (a if outside else b)[start:end]
    return result


@method(elementwise=False)
def top_k_tensor_sum(
    a: "Tensor",
    b: "Tensor",
    *,
    width: Annotated[float, Param("share of A's values that move; negative counts backwards", weight=True)] = 1.0,
    offset: Annotated[float, _OFFSET] = 0.0,
) -> "Tensor":
    """Give A's values B's order: the largest value goes where B's largest is. Only a band of magnitudes moves.

    Where A = B and where the band is empty it is A.

    Formula: sort(A)[rank of B] where the k₁-th ≤ |sort(A)| ≤ the k₂-th smallest magnitude, else A
    Source: meh, SD.Next (top_k_tensor_sum); sd-mecha (top_k_tensor_sum)

    Args:
        a, b: tensors of one shape.
        width, offset: the band, in shares of all magnitudes from the smallest on.
    """
    import torch

    if not a.numel():
        return a.clone()
    flat = a.flatten()
    ordered = flat.sort().values
    rank = torch.empty_like(flat, dtype=torch.int64)
    rank[b.flatten().argsort(stable=True)] = torch.arange(flat.numel(), device=a.device)
    start, end, outside = _region(width, offset, flat.numel())
    sizes = ordered.abs()
    low, high = (sizes.kthvalue(k).values.item() if k > 0 else -1.0 for k in (start, end))
    moves = ((sizes >= low) & (sizes <= high)) ^ outside
    return torch.where(moves[rank], ordered[rank], flat).reshape(a.shape)


def _region(width: float, offset: float, count: int) -> tuple[int, int, bool]:
    """Return first and last + 1 of a run of `count`, and whether what lies outside of them is meant."""
    if width < 0:
        offset, width = offset + width, -width
    width = min(width, 1.0)
    offset = math.fmod(1 + offset - int(offset) if offset < 0 else offset, 1.0)
    if width + offset <= 1:
        return round(offset * count), round((width + offset) * count), False
    return round((width + offset - 1) * count), round(offset * count), True


@method(elementwise=False)
def comparative_interpolation(
    a: "Tensor",
    b: "Tensor",
    *,
    place: Place,
    alpha: Annotated[float, Param("how readily B is taken; 0 gives A, 1 gives B", 0, 1, weight=True)] = 0.5,
    gamma: Annotated[float, Param("0 takes elements whole, at random; 1 blends them", 0, 1, weight=True)] = 0.0,
    seed: Annotated[int, Param("another number, another choice", 0, 2**63 - 1)] = 0,
) -> "Tensor":
    """Take B's elements the more likely the less they differ from A's. Exactly A where A = B.

    Formula: lerp(A, B, m), m = lerp([u < p], p, γ), p = ((max δ − δ) / max δ)^(1/α − 1), δ = |A − B|, u uniform
    Source: untitledmerger (comparative interpolation), which takes no seed

    Args:
        a, b: tensors of one shape.
        place: the tensor's name keys the choice.
        alpha, gamma: see above.
        seed: keys the choice, together with the name.
    """
    if not a.numel() or alpha == 0:
        return a.clone()
    apart = (a - b).abs_()
    largest = apart.max()
    if largest == 0:
        return a.clone()
    likely = ((largest - apart) / largest).pow_(1 / alpha - 1)
    key = sdkernels.philox.key(seed, place.name)
    drawn = sdkernels.philox.uniform(a.numel(), key, start=place.start, device=a.device).reshape(a.shape)
    return a.lerp(b, (drawn < likely).to(a.dtype).lerp(likely, gamma))
