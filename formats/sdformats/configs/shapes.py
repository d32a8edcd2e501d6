"""Sizes of one component, looked up by the names of its tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sdformats.rule import count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdformats.tensor import Spec


class Shapes:
    """The shapes of a component's tensors.

    Args:
        specs: a folder's tensors, ``component.key``.
        component: which of its components.
    """

    def __init__(self, specs: Mapping[str, Spec], component: str) -> None:
        prefix = f"{component}."
        self._specs = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}

    def size(self, name: str, axis: int = 0) -> int | None:
        """Return the size of one axis of a tensor; None where it is not there, or has fewer axes."""
        spec = self._specs.get(name)
        return spec.shape[axis] if spec is not None and len(spec.shape) > axis else None

    def rank(self, name: str) -> int | None:
        """Return how many axes a tensor has."""
        return len(self._specs[name].shape) if name in self._specs else None

    def count(self, pattern: str) -> int:
        """See `sdformats.keymap.count`."""
        return count(self._specs, pattern)

    def has(self, beginning: str) -> bool:
        """Whether some name begins so."""
        return any(name.startswith(beginning) for name in self._specs)

    def fill(self, config: dict[str, Any], **sizes: tuple[str, int]) -> None:
        """Put sizes into a config: by key, the name of a tensor and its axis."""
        for key, place in sizes.items():
            found = self.size(*place)
            if found is not None:
                config[key] = found


def divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`, at least 1."""
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)


def groups(channels: Sequence[int], most: int) -> int:
    """Return into how many groups all these channels can be divided, at most `most`."""
    return math.gcd(most, *channels)
