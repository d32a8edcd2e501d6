"""Fooocus's inpaint head: a convolution of mask and picture that is added to SDXL's first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.kind import Kind, Marked

if TYPE_CHECKING:
    from sdformats.kind import Looks


def _convolution(looks: Looks) -> bool:
    return next(iter(looks.specs.values())).shape == (320, 5, 3, 3)


KIND = Kind(
    name="inpaint-head",
    title="Fooocus's inpaint head",
    layouts=(Marked(name="fooocus", marks=(r"^head$",), fits=_convolution),),
    family=lambda _: "sdxl",
)
