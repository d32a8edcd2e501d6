"""CLIP inversion: image embeddings that were trained, for models that take some as their context.

::

    {"clip_image": [n, width]}, safetensors or torch; texts beside it say what it was trained for

It is a format of sdmerge. A mean of pictures' features, which an aesthetic embedding is, can be where training starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.aesthetic import NAME as AESTHETIC
from sdformats.kind import Kind, Marked
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource

NAME = "clip_image"


@dataclass(frozen=True)
class ClipInversion:
    """Everything that a file says.

    Attributes:
        vectors: [n, width].
        texts: what stands beside them.
    """

    vectors: Ref
    texts: Mapping[str, str] = field(default_factory=dict)


def read_clip_inversion(source: TensorSource) -> ClipInversion:
    """Read the vectors, but for their numbers."""
    texts = {name: text for name, text in source.metadata.items() if name != "format"}
    return ClipInversion(Stored(source, NAME), texts)


def write_named(record: ClipInversion) -> Written:
    """Return the vectors under their name."""
    return Written({NAME: record.vectors}, record.texts, tree={NAME: TensorNamed(NAME), **record.texts})


def write_aesthetic(record: ClipInversion) -> Written:
    """Return one vector as an aesthetic embedding.

    Raises:
        CannotHold: there are several.
    """
    if record.vectors.shape[0] != 1:
        raise CannotHold(f"an aesthetic embedding is one vector, and there are {record.vectors.shape[0]}")
    return Written({AESTHETIC: record.vectors}, record.texts, tree={AESTHETIC: TensorNamed(AESTHETIC), **record.texts})


WRITERS: Mapping[str, Callable[[ClipInversion], Written]] = {"named": write_named, "aesthetic": write_aesthetic}
"""By layout."""


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON."""
    count, width = read_clip_inversion(source).vectors.shape
    return {"vectors": count, "width": width}


def _rows(looks: Looks) -> bool:
    return all(len(spec.shape) == 2 and spec.dtype.is_float for spec in looks.specs.values())


KIND = Kind(
    name="clip-inversion",
    title="a CLIP inversion (trained image embeddings)",
    layouts=(Marked(name="named", marks=(rf"^{NAME}$",), fits=_rows),),
)
