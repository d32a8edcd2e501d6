"""The block weights that circulate by name.

The 38 presets of the merge-block-weighted extension (its ``csv/preset.tsv``, also in supermerger's ``mbwpresets.txt``): curves
over the 25 blocks of SD1's UNet from IN00 to OUT11. BASE is 0 in all of them but ALL_B, as in supermerger. Those lists are the
values of these formulas, rounded to between 10 and 15 digits. Supermerger's ALL_R, ALL_U and ALL_X are random and not here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdmerge.errors import RequestError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    Curve = Callable[[float], float]

_LAST = 24


def _sampled(curve: Curve) -> tuple[float, ...]:
    return tuple(curve(i / _LAST) for i in range(_LAST + 1))


def _smoothstep(x: float) -> float:
    return 3 * x**2 - 2 * x**3


def _folded(x: float) -> float:
    """Return the triangle wave that is 0 at even and 1 at odd numbers."""
    return 1 - abs(x % 2 - 1)


def _cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def _hermite(x: float, first: float, last: float) -> float:
    """Return the cubic from 0 to 1 with the given slopes at its ends."""
    return first * (x**3 - 2 * x**2 + x) + _smoothstep(x) + last * (x**3 - x**2)


def _repeated(q: int) -> Curve:
    return lambda x: _folded(q * _smoothstep(x))


def _narrowed(q: int) -> Curve:
    return lambda x: _smoothstep(_folded(q * x))


def _runs(*runs: tuple[int, float]) -> tuple[float, ...]:
    """Return `count` times `value`, run after run."""
    return tuple(float(value) for count, value in runs for _ in range(count))


def _true_hermite(x: float) -> float:
    """Return the cubic that starts one step up: the sheet it comes from measures its start from the value before, 0."""
    return _hermite(x, 100 / _LAST, 100 / _LAST) + (1 - _smoothstep(x)) / _LAST if x else 0.0


_PAIRS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("SMOOTHSTEP", "REVERSE-SMOOTHSTEP", _sampled(_smoothstep)),
    *((f"SMOOTHSTEP*{q}", f"R_SMOOTHSTEP*{q}", _sampled(_repeated(q))) for q in (2, 3, 4)),
    *((f"SMOOTHSTEP/{q}", f"R_SMOOTHSTEP/{q}", _sampled(_narrowed(q))) for q in (2, 3, 4)),
    ("COSINE", "REVERSE_COSINE", _sampled(_cosine)),
    ("TRUE_CUBIC_HERMITE", "TRUE_REVERSE_CUBIC_HERMITE", _sampled(_true_hermite)),
    ("FAKE_CUBIC_HERMITE", "FAKE_REVERSE_CUBIC_HERMITE", _sampled(lambda x: _hermite(x, 100 / _LAST, 100 / _LAST))),
)
_CURVES: dict[str, tuple[float, ...]] = {
    "GRAD_V": _sampled(lambda x: 1 - _folded(2 * x)),
    "GRAD_A": _sampled(lambda x: _folded(2 * x)),
    "FLAT_25": _runs((25, 0.25)),
    "FLAT_75": _runs((25, 0.75)),
    "WRAP08": _runs((4, 1), (17, 0), (4, 1)),
    "WRAP12": _runs((6, 1), (13, 0), (6, 1)),
    "WRAP14": _runs((7, 1), (11, 0), (7, 1)),
    "WRAP16": _runs((8, 1), (9, 0), (8, 1)),
    "MID12_50": _runs((5, 0), (14, 0.5), (6, 0)),
    "OUT07": _runs((18, 0), (7, 1)),
    "OUT12": _runs((13, 0), (12, 1)),
    "OUT12_5": _runs((12, 0), (1, 0.5), (12, 1)),
    "RING08_SOFT": _runs((5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0)),
    "RING08_5": _runs((6, 0), (4, 1), (5, 0), (4, 1), (6, 0)),
    "RING10_5": _runs((5, 0), (5, 1), (5, 0), (5, 1), (5, 0)),
    "RING10_3": _runs((6, 0), (5, 1), (3, 0), (5, 1), (6, 0)),
    **{
        name: values
        for plain, reverse, curve in _PAIRS
        for name, values in ((plain, curve), (reverse, tuple(1 - value for value in curve)))
    },
    "ALL_A": _runs((25, 0)),
    "ALL_B": _runs((25, 1)),
}
PRESETS: dict[str, tuple[float, ...]] = {
    name: (1.0 if name == "ALL_B" else 0.0, *curve) for name, curve in _CURVES.items()
}
"""Name → 26 weights: BASE, IN00 to IN11, M00, OUT00 to OUT11."""
ALIASES = {"NORMAL-SIGMOID": "SMOOTHSTEP", "REVERSE-SIGMOID": "REVERSE-SMOOTHSTEP"}
"""Names of earlier lists."""


def preset_name(name: str) -> str:
    """Return a preset's name as it is written in `PRESETS`; case does not count.

    Raises:
        RequestError: no such preset.
    """
    wanted = name.strip().upper()
    found = ALIASES.get(wanted, wanted)
    if found not in PRESETS:
        raise RequestError(
            f"{name.strip()!r} is no preset (expected one of those that `sdmerge blocks --presets` lists)"
            + nearest(wanted, (*PRESETS, *ALIASES))
        )
    return found
