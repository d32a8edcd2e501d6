"""The tensor core: blocks, threads, types, exactness."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdkernels import native
from sdmerge import api, run, worker
from sdmerge.errors import RequestError, SdmergeError
from sdmerge.options import Options
from tests.sdmerge import toys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from sdkernels.native import Library

BLOCK = 4096


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BLOCK", BLOCK)
    monkeypatch.setattr(worker, "SUM_BLOCK", BLOCK // 4)
    monkeypatch.setattr(worker, "RUN", 2 * BLOCK)


def big(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A model with tensors around the borders of blocks, of rank 0 and without elements."""
    source = torch.Generator().manual_seed(seed)
    extra = {f"extra.{n}": (n,) for n in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17)}
    shapes: dict[str, tuple[int, ...]] = {**extra, "extra.scalar": (), "extra.none": (3, 0, 5)}
    return toys.toy(seed, dtype) | {n: torch.randn(s, generator=source).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output", ["keep", "fp16", "bf16", "fp32", "fp8_e4m3fn"])
def test_native_code_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library, dtype: torch.dtype, output: str
) -> None:
    models = [big(seed, dtype) for seed in (1, 2, 3)]
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(models)]
    written = []
    for number, chosen in enumerate((None, library, library)):
        monkeypatch.setattr(native, "LIBRARY", chosen)
        out = tmp_path / "out.safetensors"
        api.add_difference(*paths, alpha=0.7, output=out, dtype=output, threads=1 + number, overwrite=True)
        written.append(out.read_bytes())
        api.merge("linear", paths, {"weights": (0.5, 0.3, 0.1), "normalize": False}, output=out, overwrite=True)
        written[-1] += out.read_bytes()
        api.convert(paths[0], out, dtype=output, overwrite=True)
        written[-1] += out.read_bytes()
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60000.0])
@pytest.mark.parametrize("index", [0, BLOCK // 4, 3 * BLOCK + 16])
def test_native_code_finds_the_same_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library, value: float, index: int
) -> None:
    models = [big(seed) for seed in (1, 2, 3)]
    name = f"extra.{3 * BLOCK + 17}"
    models[1][name][index] = value
    models[2][name][index] = -abs(value)
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(models)]
    told, written, out = [], [], tmp_path / "out.safetensors"
    for chosen in (None, library):
        monkeypatch.setattr(native, "LIBRARY", chosen)
        with pytest.raises(SdmergeError) as error:
            api.add_difference(*paths, output=out)
        assert not out.exists()
        told.append(str(error.value))
        for overflow in ("saturate", "inf"):
            report = api.add_difference(*paths, output=out, overwrite=True, overflow=overflow, allow_nonfinite=True)
            numbers = load_file(out)[name].nan_to_num(nan=12345.0)  # NaN has many bits
            written.append((numbers.tolist(), report.nonfinite, report.overflowed))
        out.unlink()
    assert name in told[0]
    assert told[0] == told[1]
    assert written[:2] == written[2:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_add_difference_equals_float64_rounded_once(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    models = [big(seed, dtype) for seed in (1, 2, 3)]
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(models)]
    api.add_difference(*paths, alpha=alpha, output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == models[0].keys()
    steps = wrong = total = 0
    for name in models[0]:
        if not models[0][name].is_floating_point():
            continue
        a, b, c = (m[name].double() for m in models)
        want = (a + alpha * (b - c)).to(dtype)
        total += want.numel()
        unequal = got[name] != want
        wrong += int(unequal.sum())
        apart = (got[name].double() - want.double()).abs()[unequal]
        allowed = 2 * torch.finfo(dtype).eps * torch.stack([a, b, c]).abs().max() if want.numel() else 0
        steps += int((apart > allowed).sum())
    assert steps == 0
    if dtype.itemsize == 2:  # wider types have no room left in the accumulator: one step, but not rarely
        assert wrong <= 0.01 * total


@pytest.mark.parametrize("whole", [False, True])
def test_the_same_bytes_with_any_number_of_threads(tmp_path: Path, whole: bool) -> None:
    models = [big(seed) for seed in (1, 2, 3)]
    if whole:
        models[0][toys.CONV_IN] = torch.randn(8, 9, 3, 3).half()
    paths = [toys.save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(models)]
    outputs = []
    for threads in (1, 2, 8):
        out = tmp_path / f"{threads}" / "out.safetensors"
        out.parent.mkdir()
        api.weighted_sum(paths, weights=(0.5, 0.3, 0.2), output=out, threads=threads)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_checkpoint_gives_the_tensors_of_its_safetensors(tmp_path: Path) -> None:
    a, b = big(1), big(2)
    trainer = {"state_dict": a, "global_step": 7, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(9)}}}]}
    torch.save(trainer, tmp_path / "a.ckpt")
    other = toys.save(tmp_path / "b.safetensors", b)
    api.convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    first = api.weighted_sum([tmp_path / "a.ckpt", other], alpha=0.3, output=tmp_path / "1.safetensors")
    api.weighted_sum([tmp_path / "a.safetensors", other], alpha=0.3, output=tmp_path / "2.safetensors")
    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    assert one.keys() == two.keys() == a.keys()
    assert all(torch.equal(one[name], two[name]) for name in a)
    assert any("optimizer_states" in note for note in first.notes)


def test_convert_keeps_every_bit(tmp_path: Path) -> None:
    tensors = big(1) | {"i8": torch.arange(-3, 3, dtype=torch.int8), "flag": torch.tensor([True, False])}
    torch.save(tensors, tmp_path / "a.pt")
    api.convert(tmp_path / "a.pt", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert np.array_equal(got[name].numpy().tobytes(), tensor.numpy().tobytes())


def test_convert_rounds_once(tmp_path: Path) -> None:
    source = toys.save(tmp_path / "a.safetensors", big(1, torch.float64))
    api.convert(source, tmp_path / "out.safetensors", dtype="fp16")
    got, want = load_file(tmp_path / "out.safetensors"), load_file(source)
    for name in want:
        expected = want[name].numpy().astype(np.float16) if want[name].is_floating_point() else want[name].numpy()
        assert got[name].numpy().tobytes() == expected.tobytes()


def test_torch_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    path = toys.saved(tmp_path, "a", 1)
    api.convert(path, tmp_path / "out.safetensors")
    assert torch.get_num_threads() == before


def test_progress_adds_up_to_the_cost(tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen: list[int] = []
    totals: list[int] = []

    @contextmanager
    def progress(_label: str, total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield seen.append

    models = [toys.save(tmp_path / f"{i}.safetensors", big(i)) for i in range(2)]
    api.weighted_sum(models, output=tmp_path / "out.safetensors", progress=progress)
    assert sum(seen) == totals[0] > 0


def test_devices_that_are_not_here_are_named(tmp_path: Path) -> None:
    assert run.pick_device(Options()).type == "cpu"
    for name in ("cuda:93", "tpu", "meta"):
        with pytest.raises(RequestError, match=name):
            run.pick_device(Options(device=name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [toys.save(tmp_path / f"{i}.safetensors", big(i)) for i in range(3)]
    outputs = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device / "out.safetensors"
        out.parent.mkdir()
        api.add_difference(*paths, alpha=0.7, output=out, device=device)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
