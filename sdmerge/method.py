"""What a merge method is: a plain function under `@method`.

Positional parameters are models, in order (``*tensors`` is any number of them). Keyword-only ones are:

- ``base``: the base model's tensor; with a default of None the base model may be left out;
- ``measured``: what the method's ``measure`` found in whole tensors, when it is given blocks; None in a plain call;
- ``place``: a `Place`, for methods that depend on which tensor and which elements they see (random ones, above all);
- ``beside``: for each model, its other tensors that the method's ``siblings`` asks for, by name;
- anything else: a parameter, annotated ``Annotated[type, Param("help", low, high)]``. The type is float, int, bool, str
  or ``tuple[float, ...]`` (one number for each model; a single one counts for all).

The decorator reads all this from the signature, registers the method under the function's name and returns the function
unchanged, so that tests call it directly. The docstring's first line is the method's summary; lines that begin with
``Formula:`` and ``Source:`` are shown by ``sdmerge methods``.

A method that is a sum may return its terms instead, under `@method` and `@summed`.

Files with methods must not use ``from __future__ import annotations``: the annotations are read as they stand. They must
not import torch at the top either, so that a help text does not wait for it: name tensors as ``"Tensor"``, in quotes.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import sdkernels
from sdmerge.errors import RequestError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from sdkernels.linear import Term

    Siblings = Callable[[str, Collection[str]], tuple[str, ...] | None]

F = TypeVar("F", bound="Callable[..., Any]")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Place:
    """Which elements a method sees.

    Attributes:
        name: the tensor's name in the output.
        start: index, in the flattened tensor, of the first element of the block; 0 for a whole tensor.
        family: the first model's, where it is known.
    """

    name: str
    start: int = 0
    family: str | None = None


@runtime_checkable
class Varying(Protocol):
    """A value that differs from tensor to tensor, as block weights do."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every value it can take."""


@dataclass(frozen=True, slots=True)
class Param:
    """What a parameter means, and the range it must lie in (both ends allowed; None is no bound).

    Attributes:
        weight: whether it says how much of a model is taken, so that it may differ from block to block.
        choices: what a str may be.
    """

    help: str
    low: float | None = None
    high: float | None = None
    weight: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as found in a method's signature.

    Attributes:
        kind: float, int, bool, str or tuple (of floats, one for each model).
    """

    name: str
    param: Param
    kind: type
    default: Any

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def expects(self) -> str:
        """What a value must be, in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.param.choices)}" if self.param.choices else "a text"
        low, high = self.param.low, self.param.high
        noun = {int: "a whole number", tuple: "finite numbers"}.get(self.kind, "a finite number")
        if low is None and high is None:
            return noun
        bounds = f"{'any' if low is None else f'{low:g}'} to {'any' if high is None else f'{high:g}'}"
        return f"{noun} from {bounds}"

    def checked(self, value: Any, count: int = 1) -> Any:
        """Return `value` in the parameter's type, for `count` models. It, or a number in a tuple, may be `Varying`.

        Raises:
            RequestError: another type, out of range, or the wrong number of numbers.
        """
        if isinstance(value, Varying) and self.kind is not tuple:
            self._check_varying(value)
            return value
        judges: dict[type, Callable[[], bool]] = {
            bool: lambda: isinstance(value, bool),
            str: lambda: isinstance(value, str) and (not self.param.choices or value in self.param.choices),
            int: lambda: isinstance(value, int) and self._holds(value),
            float: lambda: self._holds(value),
            tuple: lambda: all(isinstance(one, Varying) or self._holds(one) for one in _numbers(value)),
        }
        if not judges[self.kind]():
            near = nearest(value, self.param.choices) if isinstance(value, str) else ""
            shown = ", ".join(map(str, value)) if isinstance(value, tuple | list) else repr(value)
            raise RequestError(f"{self.name} is {shown} (expected {self.expects}){near}")
        if self.kind is float:
            return float(value)
        if self.kind is tuple:
            for one in _numbers(value):
                if isinstance(one, Varying):
                    self._check_varying(one)
            numbers = tuple(one if isinstance(one, Varying) else float(one) for one in _numbers(value))
            return self._for_each(numbers, count)
        return value

    def _check_varying(self, value: Varying) -> None:
        if not self.param.weight:
            raise RequestError(f"{self.name} is one value for all tensors and takes no block weights")
        for number in value.numbers:
            if not self._holds(number):
                raise RequestError(f"{self.name} is {number!r} in some blocks (expected {self.expects})")

    def _holds(self, number: Any) -> bool:
        if isinstance(number, bool) or not isinstance(number, int | float) or number - number != 0:
            return False
        low, high = self.param.low, self.param.high
        return (low is None or number >= low) and (high is None or number <= high)

    def _for_each(self, numbers: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        if len(numbers) == 1:
            return numbers * count
        if len(numbers) != count:
            raise RequestError(f"{len(numbers)} {self.name} for {count} models (expected one for each, or one for all)")
        return numbers


@dataclass(frozen=True)
class Method:
    """A merge method, read from its function's signature.

    Attributes:
        models: the names of its positional models; empty where it takes any number.
        base: whether it takes a base model: "no", "optional" or "required".
        at_least: the smallest number of models, the base not counted.
        takes_place: whether it is told the `Place`.
        elementwise: whether each output element depends only on the input elements at the same place. Such methods are
            given blocks, flattened; all others whole tensors in their shape.
        mixed: whether it takes tensors as they are stored, of any mix of floating types, because its kernels widen them;
            all others are given float32 (float64 where a model is stored so).
        measure: finds what an otherwise elementwise method needs to know of whole tensors (thresholds, lengths); it takes
            the same models, base and parameters as the function, which is then given blocks and the result as ``measured``.
        siblings: takes a tensor's name and the names of all tensors of the first model, and returns those that the method
            must see beside it; None where the method is not for this tensor, which is then the first model's.
        terms: takes what the function does and returns the terms whose sum its result is, where it is one, so that a run can
            make and round it in one pass.
        propagates: whether NaN or infinity in any input always shows in the result, so that checking the result is enough.
    """

    name: str
    function: Callable[..., Tensor]
    models: tuple[str, ...]
    base: str
    at_least: int
    takes_place: bool
    parameters: tuple[Parameter, ...]
    elementwise: bool
    mixed: bool
    propagates: bool
    measure: Callable[..., Any] | None = None
    siblings: Siblings | None = None
    terms: Callable[..., Sequence[Term]] | None = None

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def formula(self) -> str:
        """What the docstring says after ``Formula:``."""
        return self._said("Formula:")

    @property
    def source(self) -> str:
        """What the docstring says after ``Source:``."""
        return self._said("Source:")

    def _said(self, mark: str) -> str:
        """Return the paragraph that begins with `mark`, or the lines up to the next mark, on one line."""
        _, found, rest = (inspect.getdoc(self.function) or "").partition("\n" + mark)
        lines: list[str] = []
        for line in rest.splitlines() if found else ():
            if lines and (not line.strip() or line.startswith(("Formula:", "Source:", "Args:"))):
                break
            lines.append(line.strip())
        return " ".join(lines).strip()

    @property
    def weight(self) -> Parameter | None:
        """The first parameter that may differ from block to block: the one that is meant where none is named."""
        return next((p for p in self.parameters if p.param.weight), None)

    def parameter(self, name: str) -> Parameter:
        """Return a parameter by name.

        Raises:
            RequestError: there is none of that name; the nearest is named.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [p.name for p in self.parameters]
        raise RequestError(
            f"{self.name} has no parameter {name!r}; it has: {', '.join(known) or 'none'}{nearest(name, known)}"
        )

    def check_models(self, count: int, *, base: bool) -> None:
        """Refuse a wrong number of models, or a base that is missing or one too many.

        Raises:
            RequestError: so it is.
        """
        if self.models and count != len(self.models):
            raise RequestError(f"{self.name} takes {len(self.models)} models ({', '.join(self.models)}), not {count}")
        if count < self.at_least:
            raise RequestError(f"{self.name} takes {self.at_least} models or more, not {count}")
        if base and self.base == "no":
            raise RequestError(f"{self.name} takes no base model; it compares its models with each other")
        if not base and self.base == "required":
            raise RequestError(f"{self.name} needs a base model, which the models were made from; give it with --base")

    def check(self, count: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters' complete values for `count` models.

        Raises:
            RequestError: unknown or missing parameter, value out of range.
        """
        for name in values:
            self.parameter(name)
        missing = [p.name for p in self.parameters if p.required and p.name not in values]
        if missing:
            raise RequestError(f"{self.name} needs a value for {', '.join(missing)}")
        return {p.name: p.checked(values.get(p.name, p.default), count) for p in self.parameters}


METHODS: dict[str, Method] = {}
"""Every method by name."""


def find(name: str) -> Method:
    """Return a method by name; ``-`` counts as ``_``.

    Raises:
        RequestError: there is none of that name; the nearest is named.
    """
    from sdmerge import methods  # noqa: F401 - registers them

    found = METHODS.get(name.replace("-", "_"))
    if found is None:
        raise RequestError(f"there is no method {name!r}{nearest(name, METHODS) or '; sdmerge methods lists them'}")
    return found


def method(
    *,
    elementwise: bool = True,
    mixed: bool = False,
    propagates: bool = False,
    at_least: int = 2,
    measure: Callable[..., Any] | None = None,
    siblings: Siblings | None = None,
) -> Callable[[F], F]:
    """Register a function as a merge method; see the module's docstring and `Method`."""

    def register(function: F) -> F:
        signature = inspect.signature(function).parameters
        keyword = {n: p for n, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        models = tuple(n for n, p in signature.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        base = keyword.pop("base", None)
        place = keyword.pop("place", None)
        for given in ("measured", "beside"):
            keyword.pop(given, None)
        METHODS[function.__name__] = Method(
            name=function.__name__,
            function=function,
            models=models,
            base="no" if base is None else "required" if base.default is inspect.Parameter.empty else "optional",
            at_least=len(models) or at_least,
            takes_place=place is not None,
            parameters=tuple(_parameter(name, p) for name, p in keyword.items()),
            elementwise=elementwise and measure is None and siblings is None,
            mixed=mixed,
            propagates=propagates,
            measure=measure,
            siblings=siblings,
            terms=getattr(function, "terms", None),
        )
        return function

    return register


def summed(function: Callable[P, Sequence[Term]]) -> Callable[P, Tensor]:
    """Make a method of a function that returns the terms of a sum; see `sdkernels.linear`."""

    @functools.wraps(function)
    def add_up(*args: P.args, **extra: P.kwargs) -> Tensor:
        return sdkernels.linear.combine(function(*args, **extra))

    add_up.terms = function  # type: ignore[attr-defined]
    return add_up


def _parameter(name: str, found: inspect.Parameter) -> Parameter:
    annotation = found.annotation
    kind, *extras = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    kind = get_origin(kind) if isinstance(kind, types.GenericAlias) else kind
    for extra in extras:
        if isinstance(extra, Param) and kind in (float, int, bool, str, tuple):
            return Parameter(name, extra, kind, found.default)
    raise TypeError(f"a parameter of a merge method needs Annotated[type, Param(...)], not {annotation!r}")


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
