"""W + Σ s (up · down) in the memory of a CPU, some rows at a time: see packed.c.

Factors are packed once for the processor. A product is then added to any rows of the weight and rounded, without ever
being whole; other threads run meanwhile.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkernels import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdkernels.native import Library

Scaled = tuple[float, Tensor, Tensor]
"""s, up [rows, rank] and down [rank, columns]: matrices without gaps in their rows, of types that `native.serves`."""

_FACTORS = struct.Struct("@PPNN")


class Packed:
    """Σ s (up · down), packed.

    Args:
        library: see `sdkernels.native.LIBRARY`.
        factors: one or more, of one height and width; all ranks are put side by side.
        memory: returns so many bytes, aligned, which last as long as this is used.
        wide: whether to use AVX-512.
    """

    def __init__(
        self, library: Library, factors: Sequence[Scaled], memory: Callable[[int], Tensor], *, wide: bool
    ) -> None:
        self._library, self._wide = library, wide
        height, width = library.panel(False, wide), library.panel(True, wide)
        _, first_up, first_down = factors[0]
        self.rows, self.columns = first_up.shape[0], first_down.shape[1]
        rank = sum(up.shape[1] for _, up, _ in factors)
        self._up = memory(-(-self.rows // height) * height * rank * torch.float32.itemsize)
        self._down = memory(-(-self.columns // width) * width * rank * torch.float32.itemsize)
        start = 0
        for scale, up, down in factors:
            ranks = up.shape[1]
            library.pack_up(native.matrix(up), self.rows, ranks, scale, self._up.data_ptr(), start, rank, wide)
            library.pack_down(native.matrix(down), ranks, self.columns, self._down.data_ptr(), start, rank, wide)
            start += ranks
        self._packed = _FACTORS.pack(self._up.data_ptr(), self._down.data_ptr(), rank, self.columns)

    def add(self, weight: Tensor, out: Tensor, first: int) -> bool:
        """Round W + Σ s (up · down) into place: float32 sums, rounded once.

        Args:
            weight: rows of W, [rows, columns]; a type that `native.serves`.
            out: of that shape; likewise.
            first: which row of the product is the first.

        Returns:
            Whether all results are finite.

        Raises:
            ValueError: the product has no such rows, or another width.
        """
        rows, columns = weight.shape
        if out.shape != weight.shape or columns != self.columns or not 0 <= first <= first + rows <= self.rows:
            raise ValueError(
                f"rows {first} to {first + rows}, {columns} wide, of a product of {self.rows} x {self.columns}"
            )
        done = self._library.add_product(
            self._packed, first, weight.shape[0], native.matrix(weight), native.matrix(out), self._wide
        )
        return bool(done)


def pack(factors: Sequence[Scaled], memory: Callable[[int], Tensor]) -> Packed | None:
    """Return factors packed, see `Packed`; None where there is no library, or it does not serve them."""
    tensors = [x for _, *pair in factors for x in pair]
    served = all(native.serves(x.dtype) and x.is_cpu and x.stride(1) == 1 and x.numel() for x in tensors)
    one_size = len({(up.shape[0], down.shape[1]) for _, up, down in factors}) == 1
    fit = one_size and all(up.shape[1] == down.shape[0] for _, up, down in factors)
    if native.LIBRARY is None or not (served and fit):
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    return Packed(native.LIBRARY, factors, memory, wide=capability.startswith("AVX512"))
