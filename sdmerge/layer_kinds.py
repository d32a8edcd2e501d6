"""What a tensor is for, told from its name: the rows and columns of a picture of a model, in any family and spelling."""

from __future__ import annotations

import re

_TEXT_STREAM = re.compile(
    r"txt_(attn|mlp|mod)|context_block|ff_context|norm1_context|add_[qkv]_proj|to_add_out|norm_added"
)
_ATTENTION = re.compile(r"attn[12]?\b|attn_\d|attentions\.\d+\.(?!transformer_blocks)|SelfAttention")
_WHICH = re.compile(r"attn[12](?=\.)")
_PARTS = (
    ("qkv", re.compile(r"\bqkv\b|\bin_proj")),
    ("q", re.compile(r"(\b|to_|add_)q(_proj)?\b|\bquery\b")),
    ("k", re.compile(r"(\b|to_|add_)k(_proj)?\b|\bkey\b")),
    ("v", re.compile(r"(\b|to_|add_)v(_proj)?\b|\bvalue\b")),
    ("out", re.compile(r"\bout_proj\b|\bto_out\b|\bto_add_out\b|\bproj(_attn)?\b|\bo\b|\battn_\d\.proj_out\b")),
)
_EMBEDDING = re.compile(r"(token|position|positional|context|pos|x)_embed|\bembeddings\.|\bembed_tokens\b|\bshared\.")
_MODULATION = re.compile(r"mod\.lin\b|modulation|adaLN|norm\d?(_context)?\.linear\b|norm_out\.linear\b")
_NORM = re.compile(r"norm|\bln_|\b(in|out)_layers\.0\b|(^|diffusion_model\.)out\.0\b")
_LATER = (
    ("time / label", re.compile(r"time_|label_emb|emb_layers|[ty]_embedder|vector_in|guidance_in|add_embedding")),
    ("embedding", _EMBEDDING),
    ("embedding", re.compile(r"relative_attention_bias|\b(img|txt)_in\.")),
    ("linear1", re.compile(r"\blinear1\b|\bproj_mlp\b")),
    ("linear2", re.compile(r"\blinear2\b|\bsingle_transformer_blocks\.\d+\.proj_out\b")),
    ("feed-forward", re.compile(r"\bff(_context)?\.|mlp|DenseReluDense")),
    ("proj in / out", re.compile(r"\bproj_(in|out)\b|text_projection|final_layer\.linear")),
    (
        "conv",
        re.compile(r"conv|_layers\.\d|shortcut|skip_connection|sample|\bop\.|\binput_blocks\.0\.0\b|\bout\.2\b"),
    ),
)
_TWOFOLD = ("feed-forward", "modulation", "norm")

KINDS = (
    *(f"{which}.{part}" for which in ("attn1", "attn2", "attn", "text attn") for part in ("q", "k", "v", "qkv", "out")),
    "feed-forward",
    "text feed-forward",
    "linear1",
    "linear2",
    "modulation",
    "text modulation",
    "proj in / out",
    "conv",
    "time / label",
    "embedding",
    "norm",
    "text norm",
    "other",
)
"""Every kind of layer, in the order in which pictures show them."""

_LAYER = re.compile(r"\b(?:layers|resblocks|block)\.(\d+)\.")
_VAE = re.compile(r"\b(encoder|decoder)\.(?:(down|up)(_blocks)?\.(\d+)|(conv_in|mid))?")
_VAE_NUMBERS = 8


def kind_of(name: str) -> str:
    """Return the kind of layer that a tensor belongs to: one of `KINDS`. Biases are with their weights."""
    text = "text " if _TEXT_STREAM.search(name) else ""
    if _MODULATION.search(name):
        return text + "modulation"
    if _NORM.search(name):
        return text + "norm"
    if found := list(_ATTENTION.finditer(name)):
        behind = name[found[-1].start() :]
        for part, pattern in _PARTS:
            if pattern.search(behind):
                which = _WHICH.match(behind)
                return f"{which[0] if which else text + 'attn'}.{part}"
    for kind, pattern in _LATER:
        if pattern.search(name):
            return text + kind if kind in _TWOFOLD else kind
    return "other"


def encoder_layer(name: str) -> tuple[int, str]:
    """Return where in a text encoder a tensor is: a number to sort by, and what the place is called."""
    if match := _LAYER.search(name):
        return int(match[1]), match[1]
    return (-1, "emb") if _EMBEDDING.search(name) else (1 << 30, "end")


def vae_place(name: str) -> tuple[int, str]:
    """Return where in a VAE a tensor is: a number to sort by, in the order of the work, and what the place is called.

    Single files number the decoder's levels from the picture's side, diffusers from the other one.
    """
    match = _VAE.search(name)
    if match is None:
        return (100, "post q") if "post_quant" in name else (99, "quant") if "quant" in name else (999, "rest")
    side, step, diffusers, number, fixed = match.groups()
    base, short = (0, "enc") if side == "encoder" else (200, "dec")
    if fixed == "conv_in":
        return base, f"{short} in"
    if fixed == "mid":
        return base + (50 if side == "encoder" else 10), f"{short} mid"
    if number is None:
        return base + 90, f"{short} out"
    level = min(int(number[:3]), _VAE_NUMBERS)
    backwards = step == "up" and diffusers is None
    return base + 20 + (_VAE_NUMBERS - level if backwards else level), f"{short} {step} {number[:3]}"
