"""Null-text inversion: the unconditional text embedding of every step of a picture's way back to noise.

::

    named    {"null_text": [steps, 1, 77, width], "x_T": [1, 4, height, width]}, safetensors; texts beside it: prompt, scheduler,
             steps, guidance. A format of sdmerge, and the only one that can paint the picture again by itself
    bare     one tensor, [steps, 1, 77, width] or [steps, 77, width] (torch), without the noise
    list     a list with a tensor, [1, 77, width] or [77, width], for every step (torch), without the noise
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layout import Written
from sdformats.errors import CorruptFile
from sdformats.kind import Kind, Marked
from sdformats.torch_pickle import TensorNamed
from sdformats.views import Ref, Stored, joined, reshaped, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource

NAME, NOISE = "null_text", "x_T"
_TOKENS = 77
_WIDTHS = {768: "sd1", 1024: "sd2"}


@dataclass(frozen=True)
class NullText:
    """Everything that a file says.

    Attributes:
        embeddings: [steps, 1, tokens, width], the first step's (the noisiest's) first.
        noise: where the way back ends, as latents [1, channels, height, width]; None where the file does not hold it.
        texts: ``prompt``, ``scheduler``, ``steps``, ``guidance`` and others.
    """

    embeddings: Ref
    noise: Ref | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def read_null_text(source: TensorSource) -> NullText:
    """Read a null-text file, but for its numbers.

    Raises:
        CorruptFile: the steps of a list differ in shape or type, or one is missing.
    """
    texts = {name: text for name, text in source.metadata.items() if name != "format"}
    if NAME in source.specs:
        noise = Stored(source, NOISE) if NOISE in source.specs else None
        return NullText(_steps(Stored(source, NAME)), noise, texts)
    if "" in source.specs:
        return NullText(_steps(Stored(source, "")), None, texts)
    count = len(source.specs)
    steps = []
    for index in range(count):
        if str(index) not in source.specs:
            raise CorruptFile(
                "is missing", path=source.path, key=str(index), expected=f"a tensor for each of {count} steps"
            )
        steps.append(Stored(source, str(index)))
        if steps[-1].spec != steps[0].spec:
            raise CorruptFile(f"is {steps[-1].spec}", path=source.path, key=str(index), expected=str(steps[0].spec))
    tail = steps[0].shape[-2:]
    return NullText(joined([reshaped(step, (1, 1, *tail)) for step in steps]), None, texts)


def _steps(ref: Ref) -> Ref:
    return reshaped(ref, (ref.shape[0], 1, *ref.shape[-2:]))


def write_named(record: NullText) -> Written:
    """Return embeddings, noise and texts."""
    tensors = {NAME: record.embeddings} | ({NOISE: record.noise} if record.noise is not None else {})
    return Written(tensors, record.texts, tree={**{name: TensorNamed(name) for name in tensors}, **record.texts})


def _without_noise(record: NullText) -> None:
    if record.noise is not None:
        raise CannotHold("has no place for the noise x_T, without which the picture cannot be painted again",
                         advice="choose --to named")  # fmt: skip


def write_bare(record: NullText) -> Written:
    """Return one tensor.

    Raises:
        CannotHold: there is noise, which has no place in it.
    """
    _without_noise(record)
    return Written({"": record.embeddings}, record.texts, tree=TensorNamed(""))


def write_list(record: NullText) -> Written:
    """Return a list with a tensor for every step.

    Raises:
        CannotHold: there is noise, which has no place in it.
    """
    _without_noise(record)
    count, *tail = record.embeddings.shape
    tensors = {str(i): reshaped(rows(record.embeddings, i, i + 1), tuple(tail)) for i in range(count)}
    return Written(tensors, record.texts, tree=[TensorNamed(name) for name in tensors])


WRITERS: Mapping[str, Callable[[NullText], Written]] = {"named": write_named, "bare": write_bare, "list": write_list}
"""By layout."""


def describe(source: TensorSource) -> dict[str, Any]:
    """Return what there is to say about one, ready for JSON.

    Raises:
        See `read_null_text`.
    """
    record = read_null_text(source)
    said = {key: record.texts[key] for key in ("prompt", "scheduler", "guidance") if key in record.texts}
    return {
        "steps": record.embeddings.shape[0],
        "width": record.embeddings.shape[-1],
        "noise": record.noise is not None,
        **said,
    }


def _per_step(looks: Looks) -> bool:
    """One tensor, (steps, 1, 77, width) or (steps, 77, width)."""
    shapes = [spec.shape for spec in looks.floats.values()]
    return len(shapes) == 1 and shapes[0][1:-1] in ((1, _TOKENS), (_TOKENS,))


def _one_each(looks: Looks) -> bool:
    """A list with one tensor, (1, 77, width) or (77, width), for every step."""
    return all(spec.shape[:-1] in ((1, _TOKENS), (_TOKENS,)) for spec in looks.specs.values())


def _named(looks: Looks) -> bool:
    spec = looks.floats.get(NAME)
    return spec is not None and len(spec.shape) == 4 and spec.shape[1] == 1


def _family(looks: Looks) -> str | None:
    found = {
        _WIDTHS[spec.shape[-1]] for name, spec in looks.floats.items() if name != NOISE and spec.shape[-1] in _WIDTHS
    }
    return found.pop() if len(found) == 1 else None


KIND = Kind(
    name="null-text",
    title="null-text inversion (unconditional embeddings of every step)",
    layouts=(
        Marked(name="named", marks=(rf"^({NAME}|{NOISE})$",), fits=_named),
        Marked(name="bare", marks=(r"^$",), fits=_per_step),
        Marked(name="list", marks=(r"^\d+$",), fits=_one_each),
    ),
    family=_family,
)
