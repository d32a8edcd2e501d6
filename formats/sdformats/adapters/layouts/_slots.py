"""cloneofsimo's numbered factors: which module a number is. The order is that in which the networks build their modules."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sdformats.adapters.records import LoRA
from sdformats.adapters.shapes import checked
from sdformats.errors import CorruptFile, UnsupportedFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.record import Record
    from sdformats.views import Ref

_ATTN = ("to_q", "to_k", "to_v", "to_out.0")
_GEGLU = "ff.net.0.proj"
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_DOWN, _UP = (2, 2, 2), (0, 3, 3, 3)
"""Attentions at each level of SD1 and SD2, down and up."""
_TEXT_LAYERS = {48: 12, 92: 23, 96: 24}


@cache
def unet_modules(*, geglu: int | None) -> tuple[str, ...]:
    """Return the UNet's modules by their numbers.

    Args:
        geglu: at which place of nine in a block GEGLU is: 4 as diffusers once built it, 8 today; None: it is not trained.
    """
    blocks = [f"down_blocks.{b}.attentions.{n}" for b, count in enumerate(_DOWN) for n in range(count)]
    blocks += [f"up_blocks.{b}.attentions.{n}" for b, count in enumerate(_UP) for n in range(count)]
    blocks.append("mid_block.attentions.0")
    found = []
    for block in blocks:
        inside = [f"attn{n}.{name}" for n in (1, 2) for name in _ATTN]
        if geglu is not None:
            inside.insert(geglu, _GEGLU)
        found += [f"{block}.transformer_blocks.0.{name}" for name in inside]
    return tuple(found)


def text_modules(count: int) -> tuple[str, ...]:
    """Return the text encoder's modules by their numbers."""
    return tuple(f"text_model.encoder.layers.{n}.self_attn.{name}" for n in range(count) for name in _TEXT)


def named(component: str, pairs: Mapping[int, tuple[Ref, Ref]], where: str) -> dict[str, Record]:
    """Give numbered pairs of up and down their modules' names.

    Raises:
        CorruptFile: a number is missing.
        UnsupportedFile: so many pairs are of no selection of modules that is known.
    """
    count = len(pairs)
    if sorted(pairs) != list(range(count)):
        missing = next(n for n in range(count) if n not in pairs)
        raise CorruptFile(f"has no factors number {missing} of {component}", path=where)
    if component == "unet" and count in (128, 144):
        paths = unet_modules(geglu=_place(pairs) if count == 144 else None)
    elif component == "te1" and count in _TEXT_LAYERS:
        paths = text_modules(_TEXT_LAYERS[count])
    else:
        raise UnsupportedFile(
            f"holds {count} numbered pairs for {component}, whose modules cannot be known",
            path=where,
            expected="144 or 128 for the UNet (attention, with or without GEGLU), 48, 92 or 96 for the text encoder",
        )
    return {
        f"{component}.{path}": checked(f"{component}.{path}", LoRA(up=up, down=down))
        for path, (up, down) in zip(paths, _in_order(pairs), strict=True)
    }


def _in_order(pairs: Mapping[int, tuple[Ref, Ref]]) -> list[tuple[Ref, Ref]]:
    return [pairs[number] for number in sorted(pairs)]


def _place(pairs: Mapping[int, tuple[Ref, Ref]]) -> int:
    """Tell where GEGLU is: it alone has eight times as many rows as columns."""
    for place in (4, 8):
        up, down = pairs[place]
        if up.shape[0] == 8 * down.shape[1]:
            return place
    raise CorruptFile(
        "has no pair of GEGLU's shape among the first nine", expected="one with 8 times as many rows as columns"
    )
