"""Results that wait in memory to be written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdformats.views import Ref
from sdkernels import cast
from sdmerge.lora.refs import pattern

if TYPE_CHECKING:
    from torch import Tensor

    from sdformats.tensor import Spec
    from sdformats.views import Load


@dataclass(frozen=True, eq=False)
class Held(Ref):
    """A tensor in memory. It equals nothing but itself: comparing numbers is no business of a name.

    Attributes:
        values: in float32 or float64; or in float16, to take less memory.
        result: its shape, and the type it is rounded to when it is written.
    """

    values: Tensor
    result: Spec

    @property
    def spec(self) -> Spec:
        return self.result

    def evaluate(self, load: Load, arrays: Any) -> Any:
        """See `Ref`. Among numpy arrays, which are bit patterns, the values are rounded to their type."""
        shaped = self.values.to(cast.accumulator(self.values.dtype)).reshape(self.result.shape)
        return pattern(shaped, self.result.dtype) if arrays is np else shaped
