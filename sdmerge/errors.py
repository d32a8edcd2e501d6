"""What can be wrong with a request, as one small tree beside `sdformats.errors` (what can be wrong with a file).

::

    SdmergeError
    ├── RequestError        the request contradicts itself or the files (wrong number of models, unknown value, …)
    │   └── FamilyError     models of different families, or a family that the files do not show
    ├── MismatchError       tensors that should match do not (missing keys, shapes)
    └── ValueRefused        numbers that would spoil the result
        ├── NonFiniteInput  NaN or infinity in an input
        └── OutputOverflow  a result too large for the output type
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the end of a message about an unknown name: the known one that is spelled most like it."""
    near = get_close_matches(name, [str(one) for one in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class SdmergeError(Exception):
    """Root of all errors about a request. The message is one line: what, where, expected, next step."""


class RequestError(SdmergeError):
    """The request contradicts itself or the files."""


class FamilyError(RequestError):
    """Models of different families, or a family that the files do not show."""


class MismatchError(SdmergeError):
    """Tensors that should match do not."""


class ValueRefused(SdmergeError):
    """Numbers that would spoil the result."""


class NonFiniteInput(ValueRefused):
    """NaN or infinity in an input."""


class OutputOverflow(ValueRefused):
    """A result too large for the output type."""
