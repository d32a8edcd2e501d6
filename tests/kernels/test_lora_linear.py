"""The layer with a LoRA: against numerical derivatives, and against peft's layer in results, gradients and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from sdkernels import lora_linear as module
from sdkernels.lora_linear import lora_linear

if TYPE_CHECKING:
    from collections.abc import Callable

peft: Any = pytest.importorskip("peft")

FACTOR_GRADIENTS = ("lora_A", "lora_B")


def tensors(rows: tuple[int, ...], rank: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*rows, 5),
        "weight": normal(7, 5),
        "down": normal(rank, 5),
        "up": normal(7, rank),
        "bias": normal(7),
    }


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(
    "trained", [("down", "up"), ("x", "down", "up"), ("x", "weight", "down", "up", "bias"), ("up",)]
)
def test_gradients(rows: tuple[int, ...], trained: tuple[str, ...]) -> None:
    given = tensors(rows)
    for name in trained:
        given[name].requires_grad_()
    order = ("x", "weight", "down", "up", "bias")

    def call(*arguments: Tensor) -> Tensor:
        named = dict(zip(order, arguments, strict=True))
        return lora_linear(named["x"], named["weight"], named["down"], named["up"], 0.7, named["bias"])

    assert torch.autograd.gradcheck(call, tuple(given[name] for name in order))


def test_transposed_inputs_and_gradients() -> None:
    given = tensors((4, 3))
    flipped = given["x"].transpose(0, 1).requires_grad_()
    down = given["down"].T.contiguous().T.requires_grad_()

    def call(x: Tensor, down: Tensor) -> Tensor:
        return lora_linear(x, given["weight"], down, given["up"], 2.0).transpose(0, 1)

    assert torch.autograd.gradcheck(call, (flipped, down))


def test_second_derivatives_are_refused() -> None:
    given = {name: x.requires_grad_() for name, x in tensors((4,)).items()}
    y = lora_linear(given["x"], given["weight"], given["down"], given["up"], 1.0)
    (first,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def layers(dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return peft's layer, and ours on the same parameters."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 32, dtype=dtype))
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    frozen, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer, lambda x: lora_linear(x, frozen.weight, down, up, 6 / rank, frozen.bias)


def learned(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> list[Tensor]:
    """Return the result, and the gradients of the input and of both factors."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    (y * like).sum().backward()
    assert x.grad is not None
    factors = [p for name, p in layer.named_parameters() if any(part in name for part in FACTOR_GRADIENTS)]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in factors)
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_peft(dtype: torch.dtype) -> None:
    layer, ours = layers(dtype)
    x, like = torch.randn(3, 5, 48, dtype=dtype), torch.randn(3, 5, 32, dtype=dtype)
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for got, want in zip(learned(layer, ours, x, like), learned(layer, layer, x, like), strict=True):
        torch.testing.assert_close(got, want, **close)


def test_agrees_with_peft_under_autocast() -> None:
    layer, ours = layers()
    x, like = torch.randn(3, 5, 48), torch.randn(3, 5, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = learned(layer, ours, x, like), learned(layer, layer, x, like)
    assert got[0].dtype == want[0].dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_float32_factors_beside_a_bfloat16_weight() -> None:
    """Their gradients are more precise than bfloat16 could say."""
    given = tensors((600,), rank=4)
    x, weight = given["x"].bfloat16(), given["weight"].bfloat16()
    down, up = (given[name].bfloat16().float().requires_grad_() for name in ("down", "up"))
    y = lora_linear(x, weight, down, up, 0.5)
    like = torch.ones_like(y)
    y.backward(like)
    assert down.grad is not None
    assert up.grad is not None
    hidden = (x @ down.detach().bfloat16().T).double()
    expected = 0.5 * like.double().T @ hidden
    assert ((up.grad.double() - expected).abs().max() / expected.abs().max()).item() < 1e-6


def kept(call: Callable[[Tensor], Tensor], x: Tensor, frozen: nn.Module) -> int:
    """Return the bytes that a call keeps for its backward pass, parameters left out."""
    found: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in frozen.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    assert y.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_no_more_than_peft(autocast: bool) -> None:
    layer, ours = layers()
    x = torch.randn(64, 48).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert 0 < kept(ours, x, layer) <= kept(layer, x, layer)


def test_makes_nothing_of_the_outputs_size_beside_it() -> None:
    """The profiler sees every allocation of the forward pass: the output and the narrow product, no more."""
    _, ours = layers()
    x = torch.randn(640, 48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        ours(x)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.key_averages())
    assert allocated <= 4 * 640 * (32 + 4) + 1024


def test_parts_of_a_sum_are_those_of_the_whole() -> None:
    """Blocks of rows, as they are widened for 16-bit types."""
    rows = 2 * 4096 + 3
    source = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, n, generator=source).bfloat16() for n in (3, 5))
    got = module.outer(a, b, 0.5, torch.float32)
    want = 0.5 * a.double().T @ b.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_cases_are_summed_without_rounding() -> None:
    """So that both versions must agree bit for bit, whatever the order of their sums."""
    for case in module.add_cases():
        y, x, down, up, scale = case.make(torch.device("cpu"))
        hidden = x.double() @ down.double().T
        assert torch.equal(hidden.to(x.dtype).double(), hidden), case.name
        got, _ = module.add_reference(y.clone(), x, down, up, scale)
        torch.testing.assert_close(got.double(), y.double() + scale * hidden @ up.double().T, rtol=2**-7, atol=0)
