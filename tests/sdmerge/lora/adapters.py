"""Adapters of any kind for tests: drawn by hypothesis, written as a layout writes them, and compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import strategies as st

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.reading import check_holds
from sdformats.adapters.record import Magnitude, Record
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, LoHa, LoKr, LoRA, Norm
from sdformats.tensor import DType, Spec
from sdformats.views import bits
from sdmerge.dtypes import TORCH
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import fold, value
from tests.formats.adapters.memory import Memory
from tests.formats.adapters.samples import WIDTHS, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdformats.adapters.layout import AdapterLayout
    from sdformats.views import Ref

Shape = tuple[int, ...]
TYPES = (DType.F16, DType.BF16, DType.F32)
EPS = {DType.F16: 2.0**-11, DType.BF16: 2.0**-8, DType.F32: 2.0**-23}
ALPHAS = (None, 0.125, 0.5, 1.0, 2.0, 3.0, 7.0, 16.0, float(np.float32(0.3)))
_BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
_LAYER = "text_model.encoder.layers."
_T5 = "te3.encoder.block.0.layer."


def _unet(width: int, *, deep: bool) -> dict[str, Shape]:
    """Return modules of a UNet; the first tells the family."""
    found: dict[str, Shape] = {_BLOCK + "attn2.to_k": (6, width), "unet.down_blocks.1.attentions.0.norm": (6,)}
    found |= {_BLOCK + f"attn1.{name}": (6, 4) for name in ("to_q", "to_v", "to_out.0")}
    found |= {_BLOCK + "ff.net.0.proj": (8, 6), "unet.mid_block.attentions.0.proj_in": (6, 4)}
    found |= {"unet.conv_in": (6, 4, 3, 3), "unet.up_blocks.0.upsamplers.0.conv": (6, 4, 3, 3)}
    found |= {
        "unet.down_blocks.0.resnets.0.conv1": (6, 4, 3, 3),
        "unet.up_blocks.1.resnets.0.conv_shortcut": (6, 4, 1, 1),
    }
    found |= {"unet.down_blocks.0.downsamplers.0.conv": (6, 6, 3, 3), "unet.time_embedding.linear_2": (6, 4)}
    found |= {f"te1.{_LAYER}0.self_attn.q_proj": (6, 4), f"te1.{_LAYER}1.mlp.fc1": (6, 4)}
    if deep:
        found |= {"unet.add_embedding.linear_1": (6, 4), "te2.text_projection": (6, 4)}
        found |= {f"te2.{_LAYER}31.self_attn.out_proj": (6, 4)}
    return found


def _transformer(first: dict[str, Shape], *, more: tuple[str, ...]) -> dict[str, Shape]:
    block = "unet.transformer_blocks.0."
    found = first | {block + f"attn.{name}": (6, 4) for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj")}
    found |= {block + f"{name}": (6, 4) for name in ("attn.to_out.0", "ff.net.2", "norm1.linear")}
    found |= {"unet.norm_out.linear": (8, 4), "unet.proj_out": (6, 4), block + "attn.norm_q": (6,)}
    found |= {f"te1.{_LAYER}0.mlp.fc1": (6, 4), f"{_T5}0.SelfAttention.q": (6, 4)}
    return found | dict.fromkeys(more, (6, 4))


MODULES = {
    "sd1": _unet(WIDTHS["sd1"], deep=False),
    "sdxl": _unet(WIDTHS["sdxl"], deep=True),
    "flux": _transformer(
        {f"unet.single_transformer_blocks.0.attn.to_{x}": (6, 4) for x in "qkv"}
        | {"unet.single_transformer_blocks.0.proj_mlp": (24, 4)},
        more=("unet.x_embedder", "unet.time_text_embed.guidance_embedder.linear_1"),
    ),
    "sd3": _transformer(
        {f"unet.transformer_blocks.0.attn2.to_{x}": (6, 4) for x in "qkv"}, more=(f"te2.{_LAYER}0.mlp.fc2",)
    ),
}
"""Some modules of each family and their shapes; the first tells the family."""


class Maker:
    """Makes records out of what hypothesis draws."""

    def __init__(self, draw: Callable[..., Any], dtype: DType, seed: int) -> None:
        self.draw, self.dtype = draw, dtype
        self.memory, self.random = Memory(), np.random.default_rng(seed)

    def ref(self, *shape: int) -> Ref:
        """Return a tensor without zeros."""
        values = self.random.uniform(0.25, 1.0, shape) * self.random.choice((-1, 1), shape)
        tensor = torch.from_numpy(np.asarray(values)).to(TORCH[self.dtype])
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return self.memory.put(Spec(shape, self.dtype), data)

    def pick(self, *choices: Any) -> Any:
        """Let hypothesis choose."""
        return self.draw(st.sampled_from(choices))

    def record(self, holds: frozenset[str], shape: Shape, *, dora: bool | None = None) -> Record:
        """Return a record of some algorithm that a layout holds."""
        if len(shape) == 1:
            return Norm(weight=self.ref(*shape), bias=self.pick(None, self.ref(*shape)))
        kinds = [kind for kind in ("lora", "loha", "lokr", "glora", "oft", "boft", "ia3", "full") if kind in holds]
        kind = self.pick(*kinds)
        made: Record = getattr(self, f"_{kind}")(holds, shape)
        if made.rank is not None and not (isinstance(made, LoKr) and made.whole):
            made = replace(made, alpha=self.pick(*ALPHAS))
        if kind in ("lora", "loha", "lokr") and "bias" in holds:
            made = replace(made, bias=self.pick(None, None, self.ref(shape[0])))
        axes = ([None, "out"] if "dora" in holds else [None]) + (["in"] if "dora over columns" in holds else [])
        axis = self.pick(*axes) if dora is None else "out" if dora else None
        if axis and kind in ("lora", "loha", "lokr"):
            size = (shape[0], 1) if axis == "out" else (1, shape[1])
            lengths = self.ref(*size, *(1,) * (len(shape) - 2 if self._is_kernel(made) else 0))
            made = replace(made, magnitude=Magnitude(lengths, axis))
        return made

    def _is_kernel(self, record: Record) -> bool:
        return any(len(ref.shape) == 4 for _, ref in record.refs)

    def _lora(self, holds: frozenset[str], shape: Shape) -> LoRA:
        (out, inner, *kernel), rank = shape, self.pick(1, 2, 3)
        ones = (1,) * len(kernel)
        made = LoRA(up=self.ref(out, rank, *ones), down=self.ref(rank, inner, *kernel))
        if kernel and "tucker" in holds and self.pick(False, True):
            made = replace(made, down=self.ref(rank, inner, *ones), mid=self.ref(rank, rank, *kernel))
        return replace(made, reshape=self.pick(None, shape)) if "reshape" in holds else made

    def _loha(self, _holds: frozenset[str], shape: Shape) -> LoHa:
        (out, inner, *kernel), rank = shape, self.pick(1, 2)
        if kernel and self.pick(False, True):
            a, b, t = ([self.ref(*size) for _ in "12"] for size in ((rank, out), (rank, inner), (rank, rank, *kernel)))
            return LoHa(w1_a=a[0], w2_a=a[1], w1_b=b[0], w2_b=b[1], t1=t[0], t2=t[1])
        a, b = ([self.ref(*size) for _ in "12"] for size in ((out, rank), (rank, inner * math.prod(kernel))))
        return LoHa(w1_a=a[0], w2_a=a[1], w1_b=b[0], w2_b=b[1])

    def _lokr(self, _holds: frozenset[str], shape: Shape) -> LoKr:
        (out, inner, *kernel), rank = shape, self.pick(1, 2)
        first = self.pick({"w1": (2, 2)}, {"w1_a": (2, rank), "w1_b": (rank, 2)})
        o, i = out // 2, inner // 2
        seconds = [{"w2": (o, i, *kernel)}, {"w2_a": (o, rank), "w2_b": (rank, i * math.prod(kernel))}]
        if kernel:
            seconds.append({"w2_a": (rank, o), "w2_b": (rank, i), "t2": (rank, rank, *kernel)})
        return LoKr(**{name: self.ref(*size) for name, size in (first | self.pick(*seconds)).items()})

    def _glora(self, _holds: frozenset[str], shape: Shape) -> GLoRA:
        out, inner, rank, old = shape[0], math.prod(shape[1:]), self.pick(1, 2), self.pick(False, True)
        a, b = (self.ref(inner, rank), self.ref(rank, inner)), (self.ref(out, rank), self.ref(rank, inner))
        return GLoRA(a1=a[old], a2=a[not old], b1=b[old], b2=b[not old], old=old)

    def _oft(self, _holds: frozenset[str], shape: Shape) -> OFT:
        blocks, rescale = self.ref(shape[0] // 2, 2, 2), self.pick(None, self.ref(shape[0], 1))
        if self.pick(False, True):
            return OFT(blocks=blocks, rescale=rescale, rotations=True)
        return OFT(blocks=blocks, rescale=rescale, constraint=self.pick(*ALPHAS))

    def _boft(self, _holds: frozenset[str], shape: Shape) -> OFT:
        return OFT(blocks=self.ref(1, shape[0] // 2, 2, 2), constraint=self.pick(*ALPHAS))

    def _ia3(self, _holds: frozenset[str], shape: Shape) -> IA3:
        on_input = self.pick(False, True)
        return IA3(weight=self.ref(1, shape[1]) if on_input else self.ref(shape[0], 1), on_input=on_input)

    def _full(self, holds: frozenset[str], shape: Shape) -> Full:
        bias = self.pick(None, self.ref(shape[0]))
        replaces = "replaced weights" in holds and self.pick(False, True)
        return Full(weight=self.ref(*shape), bias=bias, replaces=replaces)


def allowed(layout: AdapterLayout, family: str) -> dict[str, Shape]:
    """Return the modules that a layout has names for."""
    assert layout.naming is not None
    found = {path: shape for path, shape in MODULES[family].items() if layout.naming.module(path, family)}
    lora_only = "norm" not in layout.holds
    return {path: shape for path, shape in found.items() if not (lora_only and len(shape) == 1)}


@st.composite
def adapters(draw: Callable[..., Any], layout: AdapterLayout, family: str) -> Adapter:
    """Draw an adapter that a layout can hold."""
    there = allowed(layout, family)
    first, *others = there
    chosen = [first, *draw(st.lists(st.sampled_from(others), unique=True, max_size=6))]
    makers = [Maker(draw, dtype, draw(st.integers(0, 9))) for dtype in draw(st.permutations(TYPES))]
    dora = draw(st.sampled_from((False, "dora" in layout.holds))) if layout.alpha == "metadata" else None
    modules = {first: makers[0].record(frozenset({"lora"}), there[first], dora=bool(dora))}
    modules |= {path: draw(st.sampled_from(makers)).record(layout.holds, there[path], dora=dora) for path in chosen[1:]}
    embeddings: dict[str, dict[str, Ref]] = {}
    if "embeddings" in layout.holds:
        inner = draw(st.sampled_from([(), ("*",), ("clip_l", "clip_g")]))
        embeddings = {"word": {key: makers[0].ref(2, 4) for key in inner}} if inner else {}
    return Adapter(modules, embeddings, {"trained by": "someone"}, family)


def write(layout: AdapterLayout, adapter: Adapter, folder: Path) -> Path:
    """Write an adapter as a layout does; return the file, or the folder."""
    check_holds(layout, adapter)
    assert layout.write is not None
    written = layout.write(layout, adapter, fold)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, ref in written.tensors.items():
        file, _, key = name.rpartition(".safetensors/") if written.texts else ("a", "", name)
        files.setdefault(f"{file}.safetensors", {})[key] = value(ref).reshape(ref.shape).to(TORCH[ref.spec.dtype])
    for file, tensors in files.items():
        save(folder / file, tensors, written.metadata)
    for file, text in written.texts.items():
        (folder / file).write_text(text)
    return folder if written.texts else folder / "a.safetensors"


def same_tensor(one: Ref, other: Ref) -> bool:
    """Whether two tensors are equal bit by bit."""
    return one.spec == other.spec and np.array_equal(bits(one), bits(other))


def check_same(one: Record, other: Record) -> None:
    """Check that two records say the same, bit by bit."""
    assert type(one) is type(other)
    assert math.isclose(one.scale, other.scale, rel_tol=1e-12)
    for name in ("on_input", "old", "rotations", "constraint", "reshape", "replaces"):
        assert getattr(one, name, None) == getattr(other, name, None), name
    assert (one.magnitude and one.magnitude.axis) == (other.magnitude and other.magnitude.axis)
    first, second = dict(one.refs), dict(other.refs)
    assert first.keys() == second.keys()
    for name, ref in first.items():
        assert same_tensor(ref, second[name]), name


def check_close(one: Record, other: Record) -> None:
    """Check that two LoRAs make the same change, but for one rounding of a factor."""
    assert isinstance(one, LoRA)
    assert isinstance(other, LoRA)
    up, down = (value(ref).double().flatten(1).abs() for ref in (one.up, one.down))
    bound = 1.01 * EPS[one.up.spec.dtype] * one.scale * (up @ down)
    made = [delta(record, lambda ref: value(ref).double()).flatten(1) for record in (one, other)]
    assert (made[0] - made[1]).abs().le(bound).all()
