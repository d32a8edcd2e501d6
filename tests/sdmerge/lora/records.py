"""Records made of tensors in memory, and what a module's weight is by what it does to its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdformats.adapters.roles import assemble
from sdformats.tensor import Spec, TensorSource
from sdformats.views import Stored
from sdmerge.dtypes import TORCH
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.record import Record
    from sdformats.views import Ref

_TYPES = {torch_type: dtype for dtype, torch_type in TORCH.items()}


class Memory(TensorSource):
    """Tensors that are in no file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.path = Path("memory")
        self.container = "memory"
        self.metadata = {}
        self.files = ()
        self.specs = {name: Spec(tuple(tensor.shape), _TYPES[tensor.dtype]) for name, tensor in tensors.items()}
        self._bytes = {name: _bytes(tensor) for name, tensor in tensors.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[name][offset : offset + len(buffer)]

    def position(self, name: str) -> tuple[int, int]:
        return 0, list(self.specs).index(name)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def held(tensor: Tensor) -> Ref:
    """Return one tensor as what records are made of."""
    return Stored(Memory({"it": tensor}), "it")


def record_of(tensors: Mapping[str, Tensor]) -> Record:
    """Return the record of tensors by LyCORIS's suffixes."""
    source = Memory(tensors)
    return assemble("module", {name: Stored(source, name) for name in tensors})


def change(record: Record, weight: Tensor | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return what we say that a record adds to a weight."""
    return delta(record, value, weight, shape)


def numbers(seed: int, *shape: int, spread: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, the same for the same seed and shape."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * spread).to(dtype)


def module_with(weight: Tensor) -> nn.Linear | nn.Conv2d:
    """Return a module with a weight; a convolution keeps the size of images."""
    made: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2, bias=False)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made


@torch.no_grad()
def probed(module: nn.Linear | nn.Conv2d) -> Tensor:
    """Return the weight that a module has by its outputs: of one unit impulse for each input."""
    if isinstance(module, nn.Linear):
        out: Tensor = module(torch.eye(module.in_features))
        return out.T
    size, half = module.kernel_size[0], module.kernel_size[0] // 2
    impulses = torch.zeros(module.in_channels, module.in_channels, size, size)
    impulses[range(module.in_channels), range(module.in_channels), half, half] = 1
    out = module(impulses)
    return out.transpose(0, 1).flip(2, 3)


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Compare by the norm of the difference, over that of what is expected."""
    assert found.shape == expected.shape
    size = torch.linalg.vector_norm(expected.double())
    assert size > 0, "compares nothing"
    apart = torch.linalg.vector_norm(found.double() - expected.double())
    assert apart <= relative * size, f"{apart / size:.2e} apart"


def by_lycoris(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Return the change that LyCORIS makes in a weight, by what the module does."""
    from lycoris.modules import get_module, make_module

    state = {f"it.{name}": tensor for name, tensor in tensors.items()}
    original = module_with(weight)
    before = probed(original)
    kind, params = get_module(state, "it")
    module = make_module(kind, params, "it", original)
    module.apply_to()
    return probed(original) - before
