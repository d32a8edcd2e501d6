"""Which block of a model a tensor belongs to: one table a family, for single-file and diffusers names alike.

Every line of a table is a block and the beginnings of its tensors' names inside the network. The names and their order are those
of merge-block-weighted and supermerger, so that weights that circulate mean the same here. Where tools disagree:

- ``time_embed`` and ``label_emb`` (what feeds every residual block) are in IN00, and ``out`` in the last OUT block. The first
  tools do so for ``time_embed`` and ``out``; others count the embedders to BASE, or leave them alone in SDXL.
- BASE is the text encoders, and whatever else is in no block.
- VAE is a block of its own. No list of weights has a place for it, and BASE does not reach it.
- Flux has no BASE in its list of 61: CLIP, T5, IN (all embedders), D00 to D18, S00 to S37, OUT, as in supermerger's forks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from sdformats.layout import DIFFUSERS, FAMILIES, SINGLE_FILE, component_of
from sdmerge.errors import FamilyError, RequestError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BASE, VAE = "BASE", "VAE"
SD3_DEPTH = 38
"""The most joint blocks that an SD3 has (3.5 large); the other models have 24."""

_PREFIX = re.compile(r"model\.diffusion_model\.|diffusion_model\.|unet\.|transformer\.")
_BARE_TE = re.compile(
    r"(transformer\.)?(resblocks|text_model)\.|(token_embedding|ln_final)\.|positional_embedding$|text_projection\b|logit_scale$"
    r"|encoder\.(block|layers|embed_tokens|final_layer_norm)\.|shared\.|(clip_l|clip_g|t5xxl)\."
)
_BARE_VAE = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
_T5 = re.compile(
    r"(text_encoders\.)?t5xxl\.|text_encoder_2\.|encoder\.(block|embed_tokens|final_layer_norm)\.|shared\."
)
_WORD = re.compile(r"([A-Z]+)(\d+)")
_MOST_SEGMENTS = 5


@dataclass(frozen=True, slots=True)
class Block:
    """A line of a table.

    Attributes:
        name: as users call it.
        single_file: beginnings of its tensors' names inside the network, as single files spell them; for what is not in the
            network, beginnings of whole names.
        diffusers: the same as diffusers spells them.
        tensors: how many a full single-file model has there; None where models of the family differ.
    """

    name: str
    single_file: tuple[str, ...]
    diffusers: tuple[str, ...]
    tensors: int | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """A family's blocks.

    Attributes:
        rows: every block in order, BASE (or what stands for it) first, VAE last.
        forms: how many weights a list may have, and which blocks they are for. Blocks that are not in `rows` are those of
            another family, whose weights are let go.
        aliases: other names, and what they stand for.
        optional: blocks that only the larger models of the family have.
    """

    family: str
    rows: tuple[Block, ...]
    forms: Mapping[int, tuple[str, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    optional: frozenset[str] = frozenset()

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' names in order, without VAE."""
        return tuple(row.name for row in self.rows if row.name != VAE)

    @cached_property
    def _found(self) -> dict[str, str]:
        inside = [row for row in self.rows if "unet" in self.components_of(row.name)]
        return {start: row.name for row in inside for start in (*row.single_file, *row.diffusers)}

    def block_of(self, name: str) -> str:
        """Return the block of a tensor, by its full name in either spelling; BASE for what is in none."""
        component = self.component_of(name)
        if component == "vae":
            return VAE
        if component == "te" and self.family == "flux":
            return "T5" if _T5.match(name) else "CLIP"
        return self._in_network(name) or BASE if component == "unet" else BASE

    def component_of(self, name: str) -> str:
        """Return the part of the model that a tensor belongs to: unet, te, vae or other.

        The text encoder, the VAE and the network are also known by their bare names, as they have them in files of their own.
        """
        if _BARE_TE.match(name):
            return "te"
        for spelling in (SINGLE_FILE, DIFFUSERS):
            component = component_of(name, spelling)
            if component in ("te1", "te2", "te3"):
                return "te"
            if component in ("unet", "vae"):
                return component
        if _BARE_VAE.match(name):
            return "vae"
        return "unet" if self._in_network(name) else "other"

    def components_of(self, block: str) -> tuple[str, ...]:
        """Return the parts of the model that a block has tensors of."""
        if block == VAE:
            return ("vae",)
        if block == BASE:
            return ("te", "unet") if self.family == "sd3" else ("te",)
        return ("te",) if block in ("CLIP", "T5") else ("unet",)

    def expand(self, word: str) -> tuple[str, ...]:
        """Return the blocks that a word stands for: a block, another name of it, or a range such as ``IN00-IN05``.

        Case does not count, nor leading zeros; a range may be given from either end, and includes what lies between.

        Raises:
            RequestError: no such block.
        """
        first, dash, last = word.partition("-")
        if not dash:
            return self._one(first, word)
        names = [row.name for row in self.rows]
        ends = [self._one(end, word) for end in (first, last)]
        found = sorted(names.index(name) for end in ends for name in end if name in names)
        return tuple(names[found[0] : found[-1] + 1])

    def _one(self, text: str, word: str) -> tuple[str, ...]:
        name = canonical(text)
        known = {**{row.name: (row.name,) for row in self.rows}, **self.aliases}
        if name not in known:
            whole = "" if text == word else f" in {word!r}"
            raise RequestError(
                f"{text!r}{whole} is no block of {self.family} (expected {shortened(self.rows)}){nearest(name, known)}"
            )
        return known[name]

    def _in_network(self, name: str) -> str | None:
        """Look up the beginnings of a name, segment by segment, so that 1 is never taken for 10."""
        prefix = _PREFIX.match(name)
        bare = name[prefix.end() :] if prefix else name
        end = -1
        for _ in range(_MOST_SEGMENTS):
            end = bare.find(".", end + 1)
            if end < 0:
                return self._found.get(bare)
            if (found := self._found.get(bare[: end + 1])) is not None:
                return found
        return None


def canonical(word: str) -> str:
    """Write a block's name as tables do: capitals, two digits."""
    name = word.strip().upper()
    match = _WORD.fullmatch(name)
    return f"{match[1]}{match[2].lstrip('0').zfill(2)}" if match and match[2].isascii() else name


def shortened(rows: Sequence[Block]) -> str:
    """Name the blocks in ranges: ``BASE, IN00-IN08, M00, OUT00-OUT08, VAE``."""
    runs: list[list[str]] = []
    for row in rows:
        kind = row.name.rstrip("0123456789")
        if runs and runs[-1][0].rstrip("0123456789") == kind:
            runs[-1].append(row.name)
        else:
            runs.append([row.name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@lru_cache(maxsize=64)
def table(family: str, depth: int | None = None) -> Table:
    """Return a family's blocks.

    Args:
        family: one of `sdformats.layout.FAMILIES`.
        depth: how many joint blocks an SD3 has. Without it the table has the most there are, and takes lists for 24 and 38.

    Raises:
        FamilyError: no such family.
    """
    if family in _UNETS:
        return _unet_table(family)
    if family == "flux":
        return _flux_table()
    if family == "sd3":
        return _sd3_table(depth)
    raise FamilyError(f"{family!r} is no family (expected one of {', '.join(FAMILIES)}){nearest(family, FAMILIES)}")


@dataclass(frozen=True, slots=True)
class _Unet:
    """A UNet's shape: depth of the transformers of each level and of the middle, 0 for none; width of each level."""

    depths: tuple[int, ...]
    middle: int
    widths: tuple[int, ...]
    label: bool
    base: int | None


_UNETS = {
    "sd1": _Unet((1, 1, 1, 0), 1, (1, 2, 4, 4), label=False, base=197),
    "sd2": _Unet((1, 1, 1, 0), 1, (1, 2, 4, 4), label=False, base=None),
    "sdxl": _Unet((0, 2, 10), 10, (1, 2, 4), label=True, base=587),
    "sdxl-refiner": _Unet((0, 4, 4, 0), 4, (1, 2, 4, 4), label=True, base=None),
}
_FOLDERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
_VAE_TENSORS = 248


def _unet_table(family: str) -> Table:
    unet = _UNETS[family]
    te = "conditioner.embedders." if unet.label else "cond_stage_model."
    folders = {"sdxl": _FOLDERS[:2], "sdxl-refiner": _FOLDERS[1:2]}.get(family, _FOLDERS[:1])
    inside = (*_down(unet), _middle(unet), *_up(unet))
    rows = (
        Block(BASE, (te,), folders, unet.base),
        *inside,
        Block(VAE, ("first_stage_model.",), ("vae.",), _VAE_TENSORS),
    )
    names = tuple(row.name for row in inside)
    forms = {len(names) + 1: (BASE, *names), len(names): names}
    if len(unet.depths) == 3:
        # weights made for SD1 keep their names: IN09 to IN11 and OUT09 to OUT11 have no counterpart and are let go
        forms |= {count: table("sd1").forms[count] for count in (26, 25)}
    return Table(family, rows, forms, {"M": ("M00",), "MID": ("M00",), "MID00": ("M00",)})


def _count(depth: int, *, skip: bool) -> int:
    """Count a residual block's tensors (two more where it changes the width), with the transformer behind it."""
    return 10 + 2 * skip + (6 + 20 * depth if depth else 0)


def _down(unet: _Unet) -> Iterator[Block]:
    embedders = ("time_embed.", "label_emb.")
    yield Block(
        "IN00",
        ("input_blocks.0.", *embedders),
        ("conv_in.", "time_embedding.", "class_embedding.", "add_embedding."),
        6 + 4 * unet.label,
    )
    number = 1
    for level, depth in enumerate(unet.depths):
        for i in range(2):
            skip = i == 0 and level > 0 and unet.widths[level] != unet.widths[level - 1]
            parts = ("resnets", "attentions") if depth else ("resnets",)
            there = tuple(f"down_blocks.{level}.{part}.{i}." for part in parts)
            yield Block(f"IN{number:02}", (f"input_blocks.{number}.",), there, _count(depth, skip=skip))
            number += 1
        if level + 1 < len(unet.depths):
            there = (f"down_blocks.{level}.downsamplers.0.",)
            yield Block(f"IN{number:02}", (f"input_blocks.{number}.",), there, 2)
            number += 1


def _middle(unet: _Unet) -> Block:
    return Block("M00", ("middle_block.",), ("mid_block.",), _count(unet.middle, skip=False) + _count(0, skip=False))


def _up(unet: _Unet) -> Iterator[Block]:
    number = 0
    for level, depth in enumerate(reversed(unet.depths)):
        for i in range(3):
            parts = ("resnets", "attentions") if depth else ("resnets",)
            here: tuple[str, ...] = (f"output_blocks.{number}.",)
            there = tuple(f"up_blocks.{level}.{part}.{i}." for part in parts)
            count = _count(depth, skip=True)
            last = level + 1 == len(unet.depths)
            if i == 2 and not last:
                there, count = (*there, f"up_blocks.{level}.upsamplers.0."), count + 2
            elif i == 2:
                here, there, count = (*here, "out."), (*there, "conv_norm_out.", "conv_out."), count + 4
            yield Block(f"OUT{number:02}", here, there, count)
            number += 1


def _flux_table() -> Table:
    doubles = tuple(Block(f"D{i:02}", (f"double_blocks.{i}.",), (f"transformer_blocks.{i}.",), 24) for i in range(19))
    singles = tuple(
        Block(f"S{i:02}", (f"single_blocks.{i}.",), (f"single_transformer_blocks.{i}.",), 8) for i in range(38)
    )
    embedders = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.")
    rows = (
        Block("CLIP", ("text_encoders.clip_l.",), ("text_encoder.",)),
        Block("T5", ("text_encoders.t5xxl.",), ("text_encoder_2.",)),
        Block("IN", embedders, ("x_embedder.", "context_embedder.", "time_text_embed."), 16),
        *doubles,
        *singles,
        Block("OUT", ("final_layer.",), ("norm_out.", "proj_out."), 4),
        Block(VAE, ("first_stage_model.", "vae."), ("vae.",)),
    )
    names = tuple(row.name for row in rows if row.name != VAE)
    aliases = {f"DOUBLE{i:02}": (f"D{i:02}",) for i in range(19)} | {f"SINGLE{i:02}": (f"S{i:02}",) for i in range(38)}
    return Table("flux", rows, {len(names): names}, {**aliases, BASE: ("CLIP", "T5", BASE)})


def _sd3_table(depth: int | None) -> Table:
    most = depth or SD3_DEPTH
    joints = tuple(Block(f"JOINT{i:02}", (f"joint_blocks.{i}.",), (f"transformer_blocks.{i}.",)) for i in range(most))
    rest = ("x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "final_layer.")
    diffusers = ("pos_embed.", "context_embedder.", "time_text_embed.", "norm_out.", "proj_out.", *_FOLDERS)
    names = tuple(row.name for row in joints)
    forms = {
        count + with_base: (*((BASE,) if with_base else ()), *names[:count])
        for count in ((depth,) if depth else (24, SD3_DEPTH))
        for with_base in (1, 0)
    }
    rows = (
        Block(BASE, (*rest, "text_encoders."), diffusers),
        *joints,
        Block(VAE, ("first_stage_model.",), ("vae.",)),
    )
    return Table("sd3", rows, forms, {}, frozenset() if depth else frozenset(names[24:]))
