"""The GPU's path of a run, on a pretended one: whatever is handed over runs as late as it may, and memory runs out on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdmerge
from sdmerge import gpu
from sdmerge import methods as _registered  # noqa: F401 - registers them
from sdmerge.errors import NonFiniteInput, OutputOverflow
from sdmerge.method import METHODS
from tests.sdmerge import toys
from tests.sdmerge.pretended import Late, Moment, Pretended, Soon, pretend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [toys.saved(tmp_path, name, seed) for seed, name in enumerate("abcd")]


def both(tmp_path: Path, call: Callable[..., Any], **options: Any) -> list[dict[str, bytes]]:
    """Return what either device makes: the bytes of every tensor."""
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device / "out.safetensors"
        out.parent.mkdir()
        call(output=out, device=device, **options)
        found.append(contents(out))
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {name: x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in load_file(path).items()}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_the_same_bytes(name: str, pretended: Pretended, models: list[Path], tmp_path: Path) -> None:
    method = METHODS[name]
    base = models[3] if method.base == "required" else None
    chosen = models[: len(method.models) or max(2, method.at_least)]
    one, two = both(tmp_path, lambda **given: sdmerge.merge(name, chosen, base=base, threads=3, **given))
    assert one == two
    assert pretended.staged
    assert not pretended.released


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"stochastic_rounding": 5}, {"dtype": "fp8_e4m3fn"}], ids=str)
def test_types_and_rounding(options: dict[str, Any], pretended: Pretended, models: list[Path], tmp_path: Path) -> None:
    one, two = both(tmp_path, lambda **given: sdmerge.add_difference(*models[:3], alpha=0.7, **given), **options)
    assert one == two
    assert pretended.staged


def test_fp8_with_factors(pretended: Pretended, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        tensors = toys.toy(seed)
        for factors, name in ((1, toys.TO_K), (8, toys.CONV_IN)):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = torch.rand(factors) + 0.5
        paths.append(toys.save(tmp_path / f"{seed}.safetensors", tensors))
    one, two = both(tmp_path, lambda **given: sdmerge.weighted_sum(paths, alpha=0.3, **given))
    assert one == two
    assert pretended.staged


def test_several_outputs_over_one_read(pretended: Pretended, models: list[Path], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        output = tmp_path / device / "o.safetensors"
        sdmerge.sweep("weighted_sum", models[:2], {"alpha": (0.0, 0.3, 1.0)}, output=output, device=device)
    made = sorted((tmp_path / "cpu").iterdir())
    assert len(made) == 3
    for path in made:
        assert contents(path) == contents(tmp_path / "cuda" / path.name)
    assert pretended.staged


@pytest.mark.parametrize("lane", [Late, Soon])
@pytest.mark.parametrize("most", [400, 100, 10])
def test_out_of_memory(
    lane: type[Late],
    most: int,
    pretended: Pretended,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch is tried in halves, and what is too large even alone is computed by the CPU: the bytes are the same."""
    pretended.lane = lane
    compute = gpu.Worker._compute

    def limited(self: gpu.Worker, batch: gpu._Batch) -> None:
        if sum(one.piece.size for one in batch.results) > most:
            raise torch.OutOfMemoryError("too much")
        compute(self, batch)

    monkeypatch.setattr(gpu.Worker, "_compute", limited)
    in_parts = gpu.Worker._in_parts

    def when_all_is_free(self: gpu.Worker, batch: Sequence[gpu.Piece]) -> None:
        assert not self._unjudged, "what is still under way holds memory"
        in_parts(self, batch)

    monkeypatch.setattr(gpu.Worker, "_in_parts", when_all_is_free)
    if lane is Late:  # on a GPU memory runs out while work is handed over, and not later
        monkeypatch.setattr(Late, "do", _at_once_if_computing)
    for name in ("add_difference", "slerp"):
        folder = tmp_path / name
        folder.mkdir()
        count = len(METHODS[name].models)
        one, two = both(
            folder, lambda name=name, count=count, **given: sdmerge.merge(name, models[:count], threads=2, **given)
        )
        assert one == two
    assert pretended.released


def _at_once_if_computing(lane: Late, work: Callable[[], None]) -> None:
    lane.given += 1
    if "_start" not in getattr(work, "__qualname__", ""):
        lane.todo.append(work)
        return
    lane.todo.append(lambda: None)
    Moment(lane, lane.given).wait()
    work()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_finite_is_told(device: str, pretended: Pretended, models: list[Path], tmp_path: Path) -> None:
    tensors = load_file(models[1])
    tensors[toys.TO_K][3, 2] = torch.nan
    save_file(tensors, models[1])
    out = tmp_path / "out.safetensors"
    for method in ("weighted_sum", "slerp"):
        with pytest.raises(NonFiniteInput, match=r"b\.safetensors: .*attn2\.to_k.*1 elements"):
            sdmerge.merge(method, models[:2], output=out, device=device)
        assert not out.exists()
    report = sdmerge.merge("weighted_sum", models[:2], output=out, device=device, allow_nonfinite=True)
    assert load_file(out)[toys.TO_K].isnan().sum() == 1
    assert list(report.nonfinite.values()) == [1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_method_hides_is_told(device: str, pretended: Pretended, models: list[Path], tmp_path: Path) -> None:
    """A slice of B that is not taken: the result is finite, and B is not."""
    assert not METHODS["tensor_sum"].propagates
    tensors = load_file(models[1])
    tensors[toys.CONV_IN][7] = torch.inf
    save_file(tensors, models[1])
    values = {"width": 0.25, "offset": 0.0}
    with pytest.raises(NonFiniteInput, match=r"b\.safetensors: 'model.diffusion_model.input_blocks.0.0.weight'"):
        sdmerge.merge("tensor_sum", models[:2], values, output=tmp_path / "out.safetensors", device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_overflow(device: str, pretended: Pretended, tmp_path: Path) -> None:
    tensors = toys.toy(0)
    tensors[toys.TO_K][2, 2] = 60000
    a, b = toys.save(tmp_path / "a.safetensors", tensors), toys.saved(tmp_path, "b", 1)
    out = tmp_path / "out.safetensors"
    values = {"weights": (2.0, 0.0), "normalize": False}
    with pytest.raises(OutputOverflow, match=r"to_k.*: 1 results are too large"):
        sdmerge.merge("linear", [a, b], values, output=out, device=device)
    for overflow, found in (("saturate", 65504.0), ("inf", torch.inf)):
        sdmerge.merge("linear", [a, b], values, output=out, device=device, overflow=overflow, overwrite=True)
        assert load_file(out)[toys.TO_K][2, 2].item() == found
