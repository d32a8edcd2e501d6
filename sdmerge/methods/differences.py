"""Ways to add what B learned over C to A, and to bring A's and B's changes over C together."""

from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.method import Param, method
from sdmerge.methods._parameters import Learned
from sdmerge.methods._shared import nonzero

if TYPE_CHECKING:
    from torch import Tensor


@method(mixed=True, propagates=True)
def train_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
) -> "Tensor":
    """Add difference as if A had been trained to it: less where A is near B already. Exactly A where B equals C or A.

    Formula: A + 1.8 α (B − C) |B − A| / (|B − A| + |B − C|), 0 for 0 / 0
    Source: supermerger (trainDifference), Chattiori, untitledmerger; sd-mecha (train_difference_mask)

    Args:
        a, b, c: tensors of one shape.
        alpha: 0 gives A.
    """
    learned = sdkernels.linear.combine(((1.0, b, c),))
    apart = sdkernels.linear.combine(((1.0, b, a),)).abs_()
    divisor = learned.abs().add_(apart)
    weight = apart.div_(divisor.add_((divisor == 0).to(divisor.dtype)))
    return a.to(learned.dtype).add(learned.mul_(weight), alpha=1.8 * alpha)


@method(elementwise=False)
def smooth_add(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
) -> "Tensor":
    """Add difference, smoothed over neighbouring elements: a median of 3, then a Gauss filter of σ = 1, along every axis.

    Edges are mirrored, the edge itself repeated; the Gauss filter ends at 4 σ. The median sees 3ⁿ neighbours of an n-axis
    tensor, so convolutions take their time. Exactly A where B equals C.

    Formula: A + α gauss₁(median₃(B − C))
    Source: supermerger (smoothAdd), Chattiori, untitledmerger

    Args:
        a, b, c: tensors of one shape.
        alpha: 0 gives A.
    """
    learned = b - c
    if not learned.numel() or not learned.count_nonzero():
        return a.clone()
    return a.add(_gauss(_median(learned)), alpha=alpha)


def _mirrored(size: int, shift: int) -> "Tensor":
    """Return the indices 0 to size − 1, shifted, mirrored at the edges with the edge repeated."""
    import torch

    at = (torch.arange(size) + shift) % (2 * size)
    return torch.where(at < size, at, 2 * size - 1 - at)


def _median(x: "Tensor") -> "Tensor":
    """Median of the 3ⁿ neighbours of each element, row by row of the first axis so that memory stays small."""
    import itertools

    import torch

    if not x.dim():
        return x.clone()
    result = torch.empty_like(x)
    shifts = [[_mirrored(size, shift).to(x.device) for shift in (-1, 0, 1)] for size in x.shape]
    rows = max(1, (1 << 18) // max(1, x[0].numel()))
    for start in range(0, x.shape[0], rows):
        neighbours = []
        for first in shifts[0]:
            part = x[first[start : start + rows]]
            for others in itertools.product(*shifts[1:]):
                shifted = part
                for axis, index in enumerate(others, 1):
                    shifted = shifted.index_select(axis, index)
                neighbours.append(shifted)
        result[start : start + rows] = torch.stack(neighbours).median(0).values
    return result


def _gauss(x: "Tensor") -> "Tensor":
    import torch

    weights = torch.exp(-0.5 * torch.arange(-4, 5, dtype=torch.float64) ** 2)
    weights /= weights.sum()
    for axis, size in enumerate(x.shape):
        total = torch.zeros_like(x)
        for shift, weight in zip(range(-4, 5), weights.tolist(), strict=True):
            total.add_(x.index_select(axis, _mirrored(size, shift).to(x.device)), alpha=weight)
        x = total
    return x


@method(elementwise=False)
def euclidean_add_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("share of what B learned", 0, 1, weight=True)] = 0.5,
) -> "Tensor":
    """Bring what A and B learned over C together by the root of their mean square, in the length of their weighted sum.

    Signs are those of the weighted sum. Where neither learned anything the result is C, and so A.

    Formula: C + s · copysign(√((1 − α) â² + α b̂²), d) / ‖√(…)‖, s = ‖d‖, d = lerp(A, B, α) − C, â = (A − C) / ‖A − C‖
    Source: meh, SD.Next (euclidean_add_difference), which give NaN for A = B = C

    Args:
        a, b, c: tensors of one shape.
        alpha: 0 gives A's change alone, 1 B's.
    """
    import torch

    changes = [_unit(a - c), _unit(b - c)]
    target = (a - c).lerp(b - c, alpha)
    root = changes[0].square_().mul_(1 - alpha).add_(changes[1].square_(), alpha=alpha).sqrt_()
    length = _length(root)
    if length == 0:
        return c + target
    return c + torch.copysign(root, target).mul_(_length(target) / length)


def _length(x: "Tensor") -> float:
    """Return the norm, from float64 sums of numbers scaled so that none of them vanishes."""
    largest = x.abs().max().item() if x.numel() else 0.0
    if largest == 0:
        return 0.0
    scaled = (x / largest).double()
    return float(largest * scaled.square().sum().sqrt().item())


def _unit(x: "Tensor") -> "Tensor":
    length = _length(x)
    return x / length if length else x.clone()


@method()
def multiply_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("exponent of what B learned", 0, 1, weight=True)] = 0.5,
    beta: Annotated[float, Param("share of B in the sign", 0, 1, weight=True)] = 0.5,
) -> "Tensor":
    """Geometric mean of what A and B learned over C; the sign is that of their weighted sum.

    Formula: C + copysign(|A − C|^(1−α) |B − C|^α, lerp(A, B, β) − C)
    Source: meh, SD.Next, Chattiori (multiply_difference)

    Args:
        a, b, c: tensors of one shape.
        alpha: 0 gives A's magnitudes, 1 B's.
        beta: 0 gives A's signs, 1 B's.
    """
    import torch

    mine, theirs = a - c, b - c
    size = mine.abs().pow_(1 - alpha).mul_(theirs.abs().pow_(alpha))
    return c + torch.copysign(size, mine.lerp(theirs, beta))


@method()
def similarity_add_difference(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Learned = 1.0,
    beta: Annotated[float, Param("how much similarity turns the difference into a sum", 0, 1, weight=True)] = 1.0,
) -> "Tensor":
    """Add difference where A and B differ, weighted sum where they are alike, element by element.

    Formula: (1 − s) (A + α (B − C)) + s ((1 − α/2) A + (α/2) B), s = β (A B / max(|A|, |B|)² + 1) / 2, β for 0 / 0
    Source: meh, SD.Next, Chattiori (similarity_add_difference)

    Args:
        a, b, c: tensors of one shape.
        alpha: 0 gives A.
        beta: 0 is add difference.
    """
    import torch

    larger = torch.maximum(a.abs(), b.abs())
    none = larger == 0
    larger = larger.masked_fill(none, 1)
    alike = ((a / larger).mul_(b / larger).add_(1).mul_(beta / 2)).masked_fill_(none, beta)
    difference = a.add(b - c, alpha=alpha)
    return difference.lerp(a.lerp(b, alpha / 2), alike)


@method(elementwise=False)
def extract(
    a: "Tensor",
    b: "Tensor",
    *,
    base: "Tensor",
    alpha: Annotated[float, Param("share of B's change", 0, 1, weight=True)] = 0.5,
    beta: Annotated[float, Param("0 takes what is alike, 1 what differs", 0, 1, weight=True)] = 0.0,
    gamma: Annotated[float, Param("exponent that sharpens the choice", 0, weight=True)] = 1.0,
) -> "Tensor":
    """Add to the base what A's and B's changes have in common, or what they have not, judged along the last axis.

    Formula: base + lerp(a, b, α) · lerp(d, 1 − d, β), d = ((cos(a, b) + 1) / 2)^γ, a = A − base, b = B − base
    Source: supermerger (extract), untitledmerger; the cosine of a zero vector is taken as 0

    Args:
        a, b: tensors of one shape.
        base: of the same shape.
        alpha, beta, gamma: see above.
    """
    mine, theirs = a - base, b - base
    if not mine.numel():
        return base.clone()
    x, y = (v.reshape(1) if not v.dim() else v for v in (mine, theirs))
    units = [v / nonzero(v.abs().amax(-1, keepdim=True)) for v in (x, y)]
    dot, first, second = ((u.double() * v.double()).sum(-1, keepdim=True) for u, v in (
        (units[0], units[1]), (units[0], units[0]), (units[1], units[1])))  # fmt: skip
    alike = ((dot / nonzero((first * second).sqrt()) + 1) / 2).clamp_(0, 1).pow_(gamma).to(a.dtype)
    share = alike.lerp(1 - alike, beta)
    return base + mine.lerp(theirs, alpha).mul_(share.reshape(()) if not mine.dim() else share)
