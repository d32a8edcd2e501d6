"""What a Kernel is: which version runs where, and that every large case of the benchmark can be computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sdkernels
from sdkernels import dropout, lerp, linear, philox, reduce, rounding
from sdkernels import kernel as kernels

LARGE = [linear.combine, lerp.blend, reduce.gram, dropout.drop, rounding.stochastic, philox.uniform, philox.normal]


def versions() -> kernels.Kernel:
    return kernels.Kernel("test.which", lambda *_, **__: torch.tensor(0), lambda *_, **__: torch.tensor(1), lambda: ())


@pytest.mark.parametrize(
    "arguments", [(torch.ones(2),), (((0.5, torch.ones(2)),),), (3, (1, 2), 0, torch.device("cpu")), (3,)]
)
def test_reference_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    assert versions()(*arguments).item() == 0
    assert versions()(*arguments, device="cpu").item() == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_fast_runs_where_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, device: str | torch.device) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    assert versions()(3, (1, 2), device=device).item() == 1
    assert versions()(3, (1, 2), 0, torch.device(device)).item() == 1
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert versions()(3, (1, 2), device=device).item() == 0


def test_every_kernel_is_found_under_its_modules_name() -> None:
    assert kernels.defined_in(sdkernels.philox) == (philox.uniform, philox.normal)
    assert kernels.defined_in(sdkernels.cast) == ()


@pytest.mark.parametrize("one", LARGE, ids=lambda one: one.name)
def test_large_case(one: kernels.Kernel) -> None:
    assert one.large is not None
    assert one.plain is not None
    case = one.large(1 << 20)
    assert 0.99 * 2**20 <= case.moved <= 1 << 20
    arguments = case.make(torch.device("cpu"))
    got = one.reference(*arguments)
    assert got.isfinite().all()
    assert counted(arguments, got) == case.moved
    want = one.plain(*arguments)
    if one in (linear.combine, lerp.blend):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-3, atol=2e-3)
    elif one is reduce.gram:
        torch.testing.assert_close(torch.stack([got[0, 0], got[0, 1], got[1, 1]]).float(), want, rtol=1e-3, atol=1.0)
    else:
        assert want.shape == got.shape
        assert abs(want.float().mean() - got.float().mean()) < 0.02


def counted(arguments: object, result: Tensor) -> int:
    """Bytes of all tensors that a call reads and writes, a matrix of sums left out."""
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, tuple | list):
            for inner in value:
                look(inner)

    look((arguments, result if result.ndim < 2 else ()))
    return sum(found.values())
