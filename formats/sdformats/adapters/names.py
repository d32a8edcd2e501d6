"""Every module that an adapter may change, as tables: names with underscores for dots cannot be read without them.

Tables are made from the structure of the networks, as large as the largest of a family, so a smaller or a narrow model is in
them too. An underscored name is looked up whole: ``input_blocks_1`` is never taken for the beginning of ``input_blocks_10``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sdformats.keymap import Rule, one
from sdformats.layouts import clip as clips
from sdformats.layouts import unet as unets

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sdformats.keymap import Table

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
    found = ["shared", "encoder.embed_tokens"]
    for n in range(_T5_LAYERS):
        block = f"encoder.block.{n}.layer."
        found += [f"{block}0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")]
        found += [f"{block}0.layer_norm", f"{block}1.layer_norm"]
        found += [f"{block}1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    return (*found, "encoder.final_layer_norm")


def _embedder(ours: str, theirs: str, inner: tuple[str, str] = ("in_layer", "out_layer")) -> Table:
    return {f"{theirs}.{inner[n]}": one(f"{ours}.linear_{n + 1}") for n in range(2)}


@cache
def flux() -> Mapping[str, Rule]:
    """Return Flux's modules: ours, as diffusers names them, by those of its makers."""
    found: Table = {"img_in": one("x_embedder"), "txt_in": one("context_embedder")}
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        found |= _embedder(f"time_text_embed.{ours}_embedder", f"{theirs}_in")
    for n in range(_FLUX_DOUBLE):
        ours, theirs = f"transformer_blocks.{n}.", f"double_blocks.{n}."
        found[f"{theirs}img_attn.qkv"] = Rule(tuple(f"{ours}attn.to_{x}" for x in "qkv"), (1, 1, 1))
        found[f"{theirs}txt_attn.qkv"] = Rule(tuple(f"{ours}attn.add_{x}_proj" for x in "qkv"), (1, 1, 1))
        pairs = {"img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out"}
        pairs |= {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
        pairs |= {"img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2"}
        pairs |= {"txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"}
        pairs |= {"img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k"}
        pairs |= {"txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k"}
        found |= {theirs + name: one(ours + mine) for name, mine in pairs.items()}
    for n in range(_FLUX_SINGLE):
        ours, theirs = f"single_transformer_blocks.{n}.", f"single_blocks.{n}."
        fused = (*(f"{ours}attn.to_{x}" for x in "qkv"), f"{ours}proj_mlp")
        found[f"{theirs}linear1"] = Rule(fused, (1, 1, 1, 4))
        pairs = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
        pairs |= {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
        found |= {theirs + name: one(ours + mine) for name, mine in pairs.items()}
    found["final_layer.adaLN_modulation.1"] = Rule(("norm_out.linear",), (1,), swapped=True)
    return found | {"final_layer.linear": one("proj_out")}


@cache
def sd3() -> Mapping[str, Rule]:
    """Return SD3's modules: ours, as diffusers names them, by those of its makers.

    The last block's context norm is of the kind whose halves are swapped; how many blocks there are differs, so its entry is
    told by its rows (see `fused.is_swapped`).
    """
    found: Table = {"x_embedder.proj": one("pos_embed.proj"), "context_embedder": one("context_embedder")}
    found |= _embedder("time_text_embed.timestep_embedder", "t_embedder", ("mlp.0", "mlp.2"))
    found |= _embedder("time_text_embed.text_embedder", "y_embedder", ("mlp.0", "mlp.2"))
    for n in range(_SD3_DEPTH):
        ours, x, context = f"transformer_blocks.{n}.", f"joint_blocks.{n}.x_block.", f"joint_blocks.{n}.context_block."
        found[f"{x}attn.qkv"] = Rule(tuple(f"{ours}attn.to_{c}" for c in "qkv"), (1, 1, 1))
        found[f"{x}attn2.qkv"] = Rule(tuple(f"{ours}attn2.to_{c}" for c in "qkv"), (1, 1, 1))
        found[f"{context}attn.qkv"] = Rule(tuple(f"{ours}attn.add_{c}_proj" for c in "qkv"), (1, 1, 1))
        found |= {f"{x}attn.proj": one(f"{ours}attn.to_out.0"), f"{x}attn2.proj": one(f"{ours}attn2.to_out.0")}
        found[f"{context}attn.proj"] = one(f"{ours}attn.to_add_out")
        for theirs, mine in ((x, "ff"), (context, "ff_context")):
            found |= {
                f"{theirs}mlp.fc1": one(f"{ours}{mine}.net.0.proj"),
                f"{theirs}mlp.fc2": one(f"{ours}{mine}.net.2"),
            }
        for theirs, mine in ((f"{x}attn.ln_", "attn.norm_"), (f"{x}attn2.ln_", "attn2.norm_")):
            found |= {f"{theirs}{c}": one(f"{ours}{mine}{c}") for c in "qk"}
        found |= {f"{context}attn.ln_{c}": one(f"{ours}attn.norm_added_{c}") for c in "qk"}
        found[f"{x}adaLN_modulation.1"] = one(f"{ours}norm1.linear")
        found[f"{context}adaLN_modulation.1"] = Rule((f"{ours}norm1_context.linear",), swapped_alone=True)
    found["final_layer.adaLN_modulation.1"] = Rule(("norm_out.linear",), (1,), swapped=True)
    return found | {"final_layer.linear": one("proj_out")}


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
