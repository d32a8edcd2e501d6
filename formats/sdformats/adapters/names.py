"""Every module that an adapter may change, as tables: names with underscores for dots cannot be read without them.

Tables are made from the structure of the networks, as large as the largest of a family, so a smaller or a narrow model is in
them too. An underscored name is looked up whole: ``input_blocks_1`` is never taken for the beginning of ``input_blocks_10``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sdformats.layouts import clip as clips
from sdformats.layouts import flux as fluxes
from sdformats.layouts import sd3 as sd3s
from sdformats.layouts import t5 as t5s
from sdformats.layouts import unet as unets

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sdformats.rule import Rule

_UNET_DEPTH, _UNET_LEVELS = 10, 4
_CLIP_LAYERS, _T5_LAYERS = 32, 24
_FLUX_DOUBLE, _FLUX_SINGLE = 19, 38
_SD3_DEPTH = 38


@cache
def unet_sgm() -> Mapping[str, str]:
    """Return the UNet's modules: diffusers' name by that of the single files (sgm, compvis).

    An upsampler stands behind the attention where there is one, so it has two names; the first is that of SDXL and of
    the inner levels.
    """
    found = _unet(attended=range(_UNET_LEVELS))
    for theirs, ours in _unet(attended=()).items():
        found.setdefault(theirs, ours)
    return found


def _unet(*, attended: Collection[int]) -> dict[str, str]:
    table = unets.modules(levels=_UNET_LEVELS, layers=2, depth=_UNET_DEPTH, attended=attended)
    return {theirs: rule.parts[0] for theirs, rule in table.items()}


@cache
def sgm_of_unet(*, shallow_first: bool) -> Mapping[str, str]:
    """Return the inverse of `unet_sgm`.

    Args:
        shallow_first: whether the first level on the way up has no attention (SD1, SD2, SDXL's refiner).
    """
    table = _unet(attended=range(1 if shallow_first else 0, _UNET_LEVELS))
    return {ours: theirs for theirs, ours in table.items()}


@cache
def unet() -> tuple[str, ...]:
    """Return the UNet's modules as diffusers names them."""
    return tuple(dict.fromkeys(unet_sgm().values()))


@cache
def clip() -> tuple[str, ...]:
    """Return the modules of CLIP's text encoders, as transformers names them."""
    return clips.modules(_CLIP_LAYERS)


@cache
def t5() -> tuple[str, ...]:
    """Return the modules of T5's encoder, as transformers names them."""
    return t5s.modules(_T5_LAYERS)


@cache
def flux() -> Mapping[str, Rule]:
    """Return Flux's modules: ours, as diffusers names them, by those of its makers."""
    return fluxes.modules(double=_FLUX_DOUBLE, single=_FLUX_SINGLE)


@cache
def sd3() -> Mapping[str, Rule]:
    """Return SD3's modules: ours, as diffusers names them, by those of its makers.

    The last block's context norm is of the kind whose halves are swapped; how many blocks there are differs, so its entry is
    told by its rows (see `fused.is_swapped`).
    """
    return sd3s.modules(depth=_SD3_DEPTH, ends=False)


@cache
def transformer() -> tuple[str, ...]:
    """Return the modules of Flux's and SD3's transformers as diffusers names them."""
    paths = (path for table in (flux(), sd3()) for fusion in table.values() for path in fusion.parts)
    return tuple(dict.fromkeys(paths))


_WIDE_KERNELS = ("conv1", "conv2", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv")


def kernel_of(path: str, family: str | None) -> tuple[int, int] | None:
    """Return the kernel of a module of a UNet; None for a matrix.

    Args:
        path: the module, behind its component.
        family: SD1 projects into and out of its attention by convolutions of one pixel, the others by matrices.
    """
    if not path.startswith("unet.") or ".transformer_blocks." in path or path.startswith("unet.transformer_blocks."):
        return None
    if path.endswith(_WIDE_KERNELS):
        return (3, 3)
    if path.endswith("conv_shortcut") or (
        path.endswith(("proj_in", "proj_out")) and family == "sd1" and "attentions" in path
    ):
        return (1, 1)
    return None
