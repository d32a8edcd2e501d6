"""What a merge method is: a plain function under `@method`.

Positional parameters are models, in order (``*tensors`` is any number of them); a keyword-only ``base`` asks for the base
model; other keyword-only parameters are numbers with defaults, annotated ``Annotated[float, Param("help", low, high)]``.
The decorator reads all this from the signature, registers the method under the function's name and returns the function
unchanged, so that tests call it directly.

Files with methods must not use ``from __future__ import annotations``: the annotations are read as they stand. They must
not import torch either, so that a help text does not wait for it: name tensors as ``"Tensor"``, in quotes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, slots=True)
class Param:
    """What a parameter means, and the range it must lie in (both ends allowed; None is no bound)."""

    help: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as found in a method's signature."""

    name: str
    param: Param
    default: Any

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Method:
    """A merge method, read from its function's signature.

    Attributes:
        models: the names of its positional models; empty where it takes any number.
        elementwise: whether each output element depends only on the input elements at the same place.
        mixed: whether it takes tensors as they are stored, of any mix of floating types, because its kernels widen them;
            all others are given float32 (float64 where a model is stored so).
        propagates: whether NaN or infinity in any input always shows in the result, so that checking the result is enough.
    """

    name: str
    function: Callable[..., Tensor]
    models: tuple[str, ...]
    takes_base: bool
    parameters: tuple[Parameter, ...]
    elementwise: bool
    mixed: bool
    propagates: bool

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def check(self, count: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters' complete values for `count` models.

        Raises:
            RequestError: wrong number of models, unknown or missing parameter, value out of range.
        """
        if self.models and count != len(self.models):
            raise RequestError(f"{self.name} takes {len(self.models)} models ({', '.join(self.models)}), not {count}")
        known = {p.name: p for p in self.parameters}
        for name in values:
            if name not in known:
                raise RequestError(f"{self.name} has no parameter {name!r}; it has: {', '.join(known) or 'none'}")
        missing = [p.name for p in self.parameters if p.required and p.name not in values]
        if missing:
            raise RequestError(f"{self.name} needs a value for {', '.join(missing)}")
        return {name: _checked(p, values.get(name, p.default)) for name, p in known.items()}


METHODS: dict[str, Method] = {}
"""Every method by name."""


def method(*, elementwise: bool = True, mixed: bool = False, propagates: bool = False) -> Callable[[F], F]:
    """Register a function as a merge method; see the module's docstring and `Method`."""

    def register(function: F) -> F:
        signature = inspect.signature(function).parameters.values()
        keyword = [p for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY]
        METHODS[function.__name__] = Method(
            name=function.__name__,
            function=function,
            models=tuple(p.name for p in signature if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD),
            takes_base=any(p.name == "base" for p in keyword),
            parameters=tuple(Parameter(p.name, _param(p.annotation), p.default) for p in keyword if p.name != "base"),
            elementwise=elementwise,
            mixed=mixed,
            propagates=propagates,
        )
        return function

    return register


def _param(annotation: Any) -> Param:
    for extra in get_args(annotation)[1:] if get_origin(annotation) is not None else ():
        if isinstance(extra, Param):
            return extra
    raise TypeError(f"a parameter of a merge method needs Annotated[type, Param(...)], not {annotation!r}")


def _checked(parameter: Parameter, value: Any) -> Any:
    low, high = parameter.param.low, parameter.param.high
    for number in value if isinstance(value, tuple) else (value,):
        finite = isinstance(number, int | float) and number - number == 0
        if not finite or (low is not None and number < low) or (high is not None and number > high):
            bounds = f"{'any number' if low is None else f'{low:g}'} to {'any number' if high is None else f'{high:g}'}"
            raise RequestError(f"{parameter.name} is {number!r} (expected a finite number from {bounds})")
    return value
