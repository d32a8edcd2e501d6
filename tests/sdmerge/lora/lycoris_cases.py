"""Layers with an adapter of every algorithm, by the names of LyCORIS: what its own modules are made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

OUT, IN, RANK, ALPHA = 16, 36, 2, 3.0
Weights = dict[str, Tensor]


def linear() -> nn.Linear:
    """Return a matrix, without a bias."""
    return nn.Linear(IN, OUT, bias=False)


def conv() -> nn.Conv2d:
    """Return a convolution, without a bias."""
    return nn.Conv2d(IN, OUT, 3, padding=1, bias=False)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def _lora(*kernel: int) -> Weights:
    ones = (1,) * len(kernel)
    return {"lora_up.weight": _noise(OUT, RANK, *ones), "lora_down.weight": _noise(RANK, IN, *kernel)}


def _tucker() -> Weights:
    return {
        "lora_up.weight": _noise(OUT, RANK, 1, 1),
        "lora_down.weight": _noise(RANK, IN, 1, 1),
        "lora_mid.weight": _noise(RANK, RANK, 3, 3),
    }


def _loha(columns: int) -> Weights:
    shapes = {"w1_a": (OUT, RANK), "w1_b": (RANK, columns), "w2_a": (OUT, RANK), "w2_b": (RANK, columns)}
    return {f"hada_{name}": _noise(*shape) for name, shape in shapes.items()}


def _loha_tucker() -> Weights:
    shapes = {"w1_a": (RANK, OUT), "w1_b": (RANK, IN), "w2_a": (RANK, OUT), "w2_b": (RANK, IN)}
    return {f"hada_{name}": _noise(*shape) for name, shape in shapes.items()} | {
        f"hada_t{n}": _noise(RANK, RANK, 3, 3) for n in (1, 2)
    }


def _lokr(*, first: bool, second: bool, kernel: tuple[int, ...] = (), core: bool = False) -> Weights:
    o1, o2, i1, i2 = 4, 4, 6, 6
    found = {"lokr_w1": _noise(o1, i1)} if first else {"lokr_w1_a": _noise(o1, RANK), "lokr_w1_b": _noise(RANK, i1)}
    size = kernel[0] * kernel[1] if kernel else 1
    if core:
        return found | {
            "lokr_t2": _noise(RANK, RANK, *kernel),
            "lokr_w2_a": _noise(RANK, o2),
            "lokr_w2_b": _noise(RANK, i2),
        }
    if second:
        return found | {"lokr_w2": _noise(o2, i2, *kernel)}
    return found | {"lokr_w2_a": _noise(o2, RANK), "lokr_w2_b": _noise(RANK, i2 * size)}


def _glora() -> Weights:
    return {
        "a1.weight": _noise(IN, RANK),
        "a2.weight": _noise(RANK, IN),
        "b1.weight": _noise(OUT, RANK),
        "b2.weight": _noise(RANK, IN),
    }


def _oft(*lead: int) -> Weights:
    return {"oft_blocks": _noise(*lead, 4, 4), "alpha": torch.tensor(0.05)}


def _dora(weights: Weights, *ones: int) -> Weights:
    return weights | {"dora_scale": torch.rand(OUT, 1, *ones) + 0.5}


Case = tuple[str, Callable[[], nn.Module], Callable[[], Weights]]
CASES: dict[str, Case] = {
    "lora": ("LoConModule", linear, _lora),
    "locon": ("LoConModule", conv, lambda: _lora(3, 3)),
    "tucker": ("LoConModule", conv, _tucker),
    "loha": ("LohaModule", linear, lambda: _loha(IN)),
    "loha-conv": ("LohaModule", conv, lambda: _loha(IN * 9)),
    "loha-tucker": ("LohaModule", conv, _loha_tucker),
    "lokr": ("LokrModule", linear, lambda: _lokr(first=False, second=False)),
    "lokr-first-whole": ("LokrModule", linear, lambda: _lokr(first=True, second=False)),
    "lokr-whole": ("LokrModule", linear, lambda: _lokr(first=True, second=True)),
    "lokr-conv": ("LokrModule", conv, lambda: _lokr(first=True, second=False, kernel=(3, 3))),
    "lokr-conv-whole": ("LokrModule", conv, lambda: _lokr(first=True, second=True, kernel=(3, 3))),
    "glora": ("GLoRAModule", linear, _glora),
    "full": ("FullModule", linear, lambda: {"diff": _noise(OUT, IN)}),
    "oft": ("DiagOFTModule", linear, lambda: _oft(4)),
    "oft-conv": ("DiagOFTModule", conv, lambda: _oft(4)),
    "oft-rescale": ("DiagOFTModule", linear, lambda: _oft(4) | {"rescale": torch.rand(OUT, 1) + 0.5}),
    "boft": ("ButterflyOFTModule", linear, lambda: _oft(3, 4)),
    "dora": ("LoConModule", linear, lambda: _dora(_lora())),
    "dora-conv": ("LoConModule", conv, lambda: _dora(_lora(3, 3), 1, 1)),
    "dora-loha": ("LohaModule", linear, lambda: _dora(_loha(IN))),
}
"""LyCORIS's class, the layer, and the adapter's tensors."""
WITHOUT_ALPHA = ("FullModule", "DiagOFTModule", "ButterflyOFTModule")


def made(name: str) -> tuple[str, nn.Module, Weights]:
    """Return a case, the same every time, with an alpha where the algorithm has one."""
    torch.manual_seed(sum(map(ord, name)))
    kind, layer, weights = CASES[name]
    tensors = weights()
    if kind not in WITHOUT_ALPHA:
        tensors["alpha"] = torch.tensor(ALPHA)
    return kind, layer(), tensors
