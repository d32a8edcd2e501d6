"""Sums and averages of two or three models, in every form that circulates; and what is done to a single model."""

import math
from typing import TYPE_CHECKING, Annotated

import sdkernels
from sdmerge.errors import RequestError
from sdmerge.method import Param, Place, method, summed
from sdmerge.methods._parameters import Between, ShareOfB
from sdmerge.methods.linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from sdmerge.methods._shared import Terms

_TINTS = {
    "sd1": ((-1.0, 1 / 3, 2 / 3), (1.0, 1.0, 0.0), (0.0, -1.0, -1.0), (1.0, 0.0, 1.0)),
    "sdxl": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (-1.0, -1.0, 0.0), (-1.0, 1.0, 0.0)),
}
"""What brightness and the three colours add to the latent channels 1 to 3."""
_SHRUNK = {"input_blocks.0.0.weight": "detail_in", "conv_in.weight": "detail_in", "out.0.weight": "detail_out",
           "conv_norm_out.weight": "detail_out", "out.2.weight": "detail_out2", "conv_out.weight": "detail_out2"}  # fmt: skip
_GROWN = {"input_blocks.0.0.bias": "detail_in", "conv_in.bias": "detail_in", "out.0.bias": "detail_out",
          "conv_norm_out.bias": "detail_out"}  # fmt: skip
_SHIFTED = ("out.2.bias", "conv_out.bias")
_NETWORKS = ("model.diffusion_model.", "diffusion_model.", "unet.", "")


@method(mixed=True, propagates=True)
@summed
def triple_sum(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: ShareOfB = 1 / 3,
    beta: Annotated[float, Param("share of C", weight=True)] = 1 / 3,
) -> "Terms":
    """Weighted sum of three models by two shares.

    Formula: (1 − α − β) A + α B + β C
    Source: supermerger (Triple sum), meh, SD.Next

    Args:
        a, b, c: tensors of one shape.
        alpha, beta: A has the rest of 1.
    """
    return (1.0, a), (alpha, b, a), (beta, c, a)


@method(propagates=True)
def sum_twice(
    a: "Tensor",
    b: "Tensor",
    c: "Tensor",
    *,
    alpha: Annotated[float, Param("share of B in the first sum", weight=True)] = 0.5,
    beta: Annotated[float, Param("share of C in the second sum", weight=True)] = 0.5,
) -> "Tensor":
    """Weighted sum of A and B, and of the result and C.

    Formula: (1 − β) ((1 − α) A + α B) + β C
    Source: supermerger (Sum Twice), meh, SD.Next, Chattiori

    Args:
        a, b, c: tensors of one shape.
        alpha, beta: shares.
    """
    return a.lerp(b, alpha).lerp(c, beta)


@method(mixed=True, propagates=True)
@summed
def weighted_subtraction(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: Annotated[float, Param("how much of B is taken out", 0, 1, weight=True)] = 0.5,
    beta: Annotated[float, Param("factor of alpha", 0, 1, weight=True)] = 0.5,
) -> "Terms":
    """Take a share of B out of A and scale the rest up: what, summed with B by that share, gives A.

    Formula: (A − α β B) / (1 − α β)
    Source: meh, SD.Next

    Args:
        a, b: tensors of one shape.
        alpha, beta: their product must be less than 1.

    Raises:
        RequestError: α β = 1, which divides by 0.
    """
    share = alpha * beta
    if share >= 1:
        raise RequestError("alpha and beta are both 1, which leaves nothing of A (expected a product below 1)")
    return (1.0, a), (share / (1 - share), a, b)


@method(mixed=True, propagates=True)
def smoothstep(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: Between = 0.5,
) -> "Tensor":
    """Weighted sum whose share of B starts and ends slowly.

    Formula: (1 − s) A + s B, s = α² (3 − 2α)
    Source: diffusers' checkpoint merger (sigmoid)

    Args:
        a, b: tensors of one shape.
        alpha: 0 gives A, 1 gives B.
    """
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha))


@method(mixed=True, propagates=True)
def inverse_smoothstep(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: Between = 0.5,
) -> "Tensor":
    """Weighted sum whose share of B changes fastest at both ends.

    Formula: (1 − s) A + s B, s = ½ − sin(asin(1 − 2α) / 3)
    Source: diffusers' checkpoint merger (inv_sigmoid)

    Args:
        a, b: tensors of one shape.
        alpha: 0 gives A, 1 gives B.
    """
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * alpha) / 3))


@method()
def geometric(
    a: "Tensor",
    b: "Tensor",
    *,
    alpha: Annotated[float, Param("exponent of B", 0, 1, weight=True)] = 0.5,
) -> "Tensor":
    """Geometric mean of two models, element by element, as complex numbers; the real part of it.

    Where the signs differ the mean lies beside the real line: at α = ½ its real part is 0. Exactly A where A = B.

    Formula: |A|^(1−α) |B|^α cos(π ((1 − α)[A < 0] + α [B < 0])) = Re(A^(1−α) B^α)
    Source: sd-mecha (geometric_sum); Chattiori's real power gives NaN for negative numbers

    Args:
        a, b: tensors of one shape.
        alpha: 0 gives A, 1 gives B.
    """
    import torch

    turn = torch.cos(math.pi * ((1 - alpha) * (a < 0) + alpha * (b < 0)))
    return torch.where(a == b, a, a.abs().pow(1 - alpha).mul_(b.abs().pow(alpha)).mul_(turn.to(a.dtype)))


@method(propagates=True)
def maximum(*tensors: "Tensor") -> "Tensor":
    """Largest value of each element.

    Formula: max(x₁, x₂, …)
    Source: Chattiori (Max)

    Args:
        tensors: tensors of one shape.
    """
    import torch

    result = tensors[0].clone()
    for x in tensors[1:]:
        torch.maximum(result, x, out=result)
    return result


@method(propagates=True)
def minimum(*tensors: "Tensor") -> "Tensor":
    """Smallest value of each element.

    Formula: min(x₁, x₂, …)
    Source: the counterpart of Chattiori's Max

    Args:
        tensors: tensors of one shape.
    """
    import torch

    result = tensors[0].clone()
    for x in tensors[1:]:
        torch.minimum(result, x, out=result)
    return result


@method(mixed=True, propagates=True)
@summed
def scale(
    a: "Tensor",
    *,
    alpha: Annotated[float, Param("factor", weight=True)] = 1.0,
) -> "Terms":
    """Multiply a model by a number.

    Formula: α A
    Source: supermerger (self)

    Args:
        a: any tensor.
        alpha: 1 gives A.
    """
    return ((alpha, a),)


@method(propagates=True)
def plus_random(
    a: "Tensor",
    *,
    place: Place,
    alpha: Annotated[float, Param("standard deviation of the noise", weight=True)] = 0.01,
    seed: Annotated[int, Param("another number, another noise", 0, 2**63 - 1)] = 0,
) -> "Tensor":
    """Add normal noise. The same seed gives the same noise on any machine.

    Formula: A + α N(0, 1)
    Source: supermerger (plus random), which takes no seed

    Args:
        a: any tensor, or a block of one.
        place: its name, and where the block begins.
        alpha: 0 gives A.
        seed: keys the noise, together with the name.
    """
    key = sdkernels.philox.key(seed, place.name)
    noise = sdkernels.philox.normal(a.numel(), key, start=place.start, device=a.device)
    return a.add(noise.reshape(a.shape).to(a.dtype), alpha=alpha)


@method(propagates=True)
def adjust(
    a: "Tensor",
    *,
    place: Place,
    detail_in: Annotated[float, Param("IN: detail by the first convolution")] = 0.0,
    detail_out: Annotated[float, Param("OUT: detail by the last norm")] = 0.0,
    detail_out2: Annotated[float, Param("OUT2: detail by the last convolution")] = 0.0,
    contrast: Annotated[float, Param("CONT: added to the first latent channel")] = 0.0,
    brightness: Annotated[float, Param("BRI: brightness")] = 0.0,
    col1: Annotated[float, Param("COL1: first colour")] = 0.0,
    col2: Annotated[float, Param("COL2: second colour")] = 0.0,
    col3: Annotated[float, Param("COL3: third colour")] = 0.0,
    latent: Annotated[str, Param("whose colours the latent channels are", choices=("sd1", "sdxl"))] = "sd1",
) -> "Tensor":
    """Change detail, contrast, brightness and colour of what a model paints, by six tensors of its UNet.

    Formula: weight · (1 − d/100), bias · (1 + d/50) of input_blocks.0.0 (IN) and out.0 (OUT); weight · (1 − d/100) of out.2
    (OUT2); out.2.bias + (CONT, tints · (BRI, COL1, COL2, COL3)) / 50
    Source: supermerger (adjust)

    Args:
        a: any tensor, or a block of one.
        place: its name, and where the block begins.
        detail_in, detail_out, detail_out2, contrast, brightness, col1, col2, col3: 0 changes nothing.
        latent: the family.
    """
    details = {"detail_in": detail_in, "detail_out": detail_out, "detail_out2": detail_out2}
    name = next((place.name.removeprefix(root) for root in _NETWORKS if place.name.startswith(root)), place.name)
    if name in _SHRUNK:
        return a * (1 - 0.01 * details[_SHRUNK[name]])
    if name in _GROWN:
        return a * (1 + 0.02 * details[_GROWN[name]])
    if name in _SHIFTED:
        tints = zip(*_TINTS[latent], strict=True)
        amounts = (brightness, col1, col2, col3)
        shifts = [contrast, *(sum(n * t for n, t in zip(amounts, row, strict=True)) for row in tints)]
        return a + 0.02 * a.new_tensor(shifts[place.start : place.start + a.numel()])
    return a.clone()
