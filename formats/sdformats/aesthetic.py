"""Aesthetic embeddings: the mean of some pictures' CLIP features, one vector.

::

    bare     a tensor, [1, width] or [width], and nothing else (torch); its name is ""
    named    {"aesthetic_embedding": the same tensor}, for safetensors, where a tensor has a name

A textual-inversion embedding of one vector can look like the bare one; see `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.adapters.layout import Written
from sdformats.kind import Kind, Marked
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref, Stored, reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource

NAME = "aesthetic_embedding"
_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
"""The features of CLIP-L, OpenCLIP-H and OpenCLIP-bigG."""


@dataclass(frozen=True)
class Aesthetic:
    """Everything that a file says.

    Attributes:
        vector: [1, width] or [width].
        texts: what stands beside it.
    """

    vector: Ref
    texts: Mapping[str, str] = field(default_factory=dict)


def read_aesthetic(source: TensorSource) -> Aesthetic:
    """Read an aesthetic embedding, but for its numbers."""
    (key,) = (name for name, spec in source.specs.items() if spec.dtype.is_float)
    texts = {name: text for name, text in source.metadata.items() if name != "format"}
    return Aesthetic(Stored(source, key), texts)


def write_bare(record: Aesthetic) -> Written:
    """Return the tensor alone, as it is."""
    return Written({"": record.vector}, record.texts, tree=TensorNamed(""))


def write_named(record: Aesthetic) -> Written:
    """Return the tensor under a name."""
    return Written({NAME: record.vector}, record.texts, tree={NAME: TensorNamed(NAME), **record.texts})


def write_clip_inversion(record: Aesthetic) -> Written:
    """Return it as the start of a CLIP inversion; see `clip_inversion`."""
    ref = reshaped(record.vector, (1, record.vector.shape[-1]))
    return Written({"clip_image": ref}, record.texts, tree={"clip_image": TensorNamed("clip_image"), **record.texts})


WRITERS: Mapping[str, Callable[[Aesthetic], Written]] = {
    "bare": write_bare,
    "named": write_named,
    "clip-inversion": write_clip_inversion,
}
"""By layout."""


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON."""
    return {"width": read_aesthetic(source).vector.shape[-1]}


def _one_vector(looks: Looks) -> bool:
    return all(spec.shape in ((width,), (1, width)) for spec in looks.floats.values() for width in looks.widths)


def _alone(looks: Looks) -> bool:
    return len(looks.floats) == 1 and _one_vector(looks)


def _known_width(looks: Looks) -> bool:
    return _alone(looks) and looks.widths <= _WIDTHS.keys()


def _family(looks: Looks) -> str | None:
    return next((_WIDTHS.get(width) for width in looks.widths), None)


KIND = Kind(
    name="aesthetic",
    title="an aesthetic embedding (the mean of pictures' CLIP features)",
    layouts=(
        Marked(name="bare", marks=(r"^$",), fits=_known_width),
        Marked(name="named", marks=(rf"^{NAME}$",), fits=_alone),
    ),
    family=_family,
)
