"""Methods that take the more of B the less it resembles A."""

from typing import TYPE_CHECKING, Annotated

from sdmerge.method import Param, method
from sdmerge.methods._shared import nonzero

if TYPE_CHECKING:
    from torch import Tensor

_ALPHA = Param("similarity up to which B is taken whole", weight=True)


@method(elementwise=False)
def cosine_a(a: "Tensor", b: "Tensor", *, alpha: Annotated[float, _ALPHA] = 0.5) -> "Tensor":
    """Take the more of A the more alike A and B are along the first axis.

    supermerger scales the similarity by its 1st and 99th percentile over the whole model, which costs another pass over
    both; this, like sd-mecha, looks at one tensor at a time.

    Formula: lerp(A, B, k), k = 1 − clip(cos(A, B) − α, 0, 1), the cosine along axis 0
    Source: sd-mecha (add_cosine_a); supermerger, Chattiori (cosineA)

    Args:
        a, b: tensors of one shape. A zero vector resembles nothing: its cosine is 0.
        alpha: 1 gives B, −1 gives A where both are parallel.
    """
    if not a.numel():
        return a.clone()
    return a.lerp(b, 1 - (_along_columns(a, b) - alpha).clamp_(0, 1))


@method(elementwise=False)
def cosine_b(a: "Tensor", b: "Tensor", *, alpha: Annotated[float, _ALPHA] = 0.5) -> "Tensor":
    """Take the more of A the more alike A and B are, along the first axis and as a whole.

    Like `cosine_a` it looks at one tensor at a time.

    Formula: lerp(A, B, k), k = 1 − clip(c − α, 0, 1), c the mean of the cosine along axis 0 and that of the whole tensors
    Source: sd-mecha (add_cosine_b); supermerger, Chattiori (cosineB)

    Args:
        a, b: tensors of one shape. A zero vector resembles nothing: its cosine is 0.
        alpha: 1 gives B.
    """
    if not a.numel():
        return a.clone()
    overall = _cosine(a.reshape(-1, 1), b.reshape(-1, 1)).reshape(()).to(a.dtype)
    return a.lerp(b, 1 - ((_along_columns(a, b) + overall) / 2 - alpha).clamp_(0, 1))


def _along_columns(a: "Tensor", b: "Tensor") -> "Tensor":
    """Return the cosine along axis 0, in the shape of the other axes."""
    rows = (x.reshape(x.shape[0] if x.dim() else 1, -1) for x in (a, b))
    return _cosine(*rows).to(a.dtype).reshape(a.shape[1:])


def _cosine(x: "Tensor", y: "Tensor") -> "Tensor":
    """Return the cosines of the columns, summed in float64; 0 where a column is zero."""
    x, y = (v / nonzero(v.abs().amax(0)) for v in (x, y))
    x, y = x.double(), y.double()
    return (x * y).sum(0) / nonzero((x.square().sum(0) * y.square().sum(0)).sqrt())
