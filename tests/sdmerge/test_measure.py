"""Sums over pairs of tensors, judged by numpy in float64."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sdformats.files import open_source
from sdmerge.measure import Measures, compare
from sdmerge.step import Read
from sdmerge.worker import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

F8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def measured(folder: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor], threads: int = 2) -> dict[str, Measures]:
    """Write both and compare what both have; a name's factor is called NAME.scale."""
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path, tensors in zip(paths, (a, b), strict=True):
        save_file(dict(tensors), path)
    names = [name for name in a if not name.endswith(".scale")]
    with open_source(paths[0]) as one, open_source(paths[1]) as two:
        pairs = [tuple(_read(source, name) for source in (one, two)) for name in names]
        done = compare(pairs, threads, lambda _: None)  # type: ignore[arg-type]
    return dict(zip(names, done, strict=True))


def _read(source: Any, name: str) -> Read:
    return Read(source, name, f"{name}.scale" if f"{name}.scale" in source.specs else None)


def only(folder: Path, a: Tensor, b: Tensor) -> Measures:
    return measured(folder, {"x": a}, {"x": b})["x"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, *F8])
def test_distance_and_cosine_are_those_of_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(1)
    a = torch.randn(BLOCK + 77, generator=source).to(dtype)
    b = (a.float() + 0.1 * torch.randn(BLOCK + 77, generator=source)).to(dtype)
    found = only(tmp_path, a, b)
    x, y = a.double().numpy(), b.double().numpy()
    assert found.distance == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    stored = [side.view(torch.uint8).reshape(BLOCK + 77, -1).numpy() for side in (a, b)]
    assert found.changed == (stored[0] != stored[1]).any(axis=1).sum()
    assert (found.elements, found.measured, found.nonfinite) == (BLOCK + 77, BLOCK + 77, 0)


def test_a_small_difference_is_not_lost_in_large_norms(tmp_path: Path) -> None:
    a = torch.full((1000,), 1.0, dtype=torch.float32)
    b = a.clone()
    b[7] = 1 + 2**-23
    found = only(tmp_path, a, b)
    assert found.changed == 1
    assert found.distance == pytest.approx(2**-23 / math.sqrt(1000), rel=1e-12)


def test_the_numbers_do_not_depend_on_threads(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(2)
    a = {f"{i}": torch.randn(3 * BLOCK + i, generator=source).half() for i in range(3)}
    b = {name: (value * 1.01).half() for name, value in a.items()}
    one = measured(tmp_path, a, b, threads=1)
    assert all(measured(tmp_path, a, b, threads=8) == one for _ in range(3))
    assert all(value.changed > BLOCK for value in one.values())


bits = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40)


@settings(max_examples=60)
@given(a=bits, b=bits)
def test_any_bits(tmp_path_factory: pytest.TempPathFactory, a: list[int], b: list[int]) -> None:
    count = min(len(a), len(b))
    halves = [np.array(side[:count], dtype=np.uint16).view(np.float16) for side in (a, b)]
    tensors = [torch.from_numpy(side) for side in halves]
    found = only(tmp_path_factory.mktemp("any"), *tensors)
    x, y = (side.astype(np.float64) for side in halves)
    fine = np.isfinite(x) & np.isfinite(y)
    assert found.changed == sum(i != j for i, j in zip(a, b, strict=False))
    assert (found.measured, found.nonfinite) == (fine.sum(), (~fine).sum())
    assert found.dd == pytest.approx(((x[fine] - y[fine]) ** 2).sum(), rel=1e-12)
    assert found.ab == pytest.approx((x[fine] * y[fine]).sum(), rel=1e-9, abs=1e-9)
    assert found.aa == pytest.approx((x[fine] ** 2).sum(), rel=1e-12)
    assert found.bb == pytest.approx((y[fine] ** 2).sum(), rel=1e-12)


def test_bits_count_as_changed_where_values_do_not_differ(tmp_path: Path) -> None:
    found = only(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (found.changed, found.distance, found.cosine) == (1, 0.0, 1.0)
    nan = torch.tensor([math.nan, 3.0])
    found = only(tmp_path, nan, nan)
    assert (found.changed, found.nonfinite, found.distance, found.cosine) == (0, 1, 0.0, 1.0)


def test_zeros(tmp_path: Path) -> None:
    zero, one = torch.zeros(5), torch.ones(5)
    assert (only(tmp_path, zero, zero).distance, only(tmp_path, zero, zero).cosine) == (0.0, None)
    assert (only(tmp_path, zero, one).distance, only(tmp_path, zero, one).cosine) == (math.inf, None)
    assert (only(tmp_path, one, zero).distance, only(tmp_path, one, zero).cosine) == (1.0, None)
    assert only(tmp_path, one, -one).distance == pytest.approx(2.0)
    assert only(tmp_path, one, -one).cosine == pytest.approx(-1.0)


def test_no_elements_and_no_rank(tmp_path: Path) -> None:
    empty = only(tmp_path, torch.zeros(0, 3), torch.zeros(0, 3))
    assert (empty.elements, empty.distance, empty.cosine) == (0, None, None)
    scalar = only(tmp_path, torch.tensor(2.0), torch.tensor(3.0))
    assert (scalar.changed, scalar.distance, scalar.cosine) == (1, 0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_compared_by_their_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.tensor([0, 1, 0, 1], dtype=dtype)
    b = torch.tensor([0, 1, 1, 0], dtype=dtype)
    found = only(tmp_path, a, b)
    assert (found.elements, found.changed, found.measured, found.distance) == (4, 2, 0, None)


def test_two_types_are_compared_by_value(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 0.5, 0.1, math.nan])
    found = only(tmp_path, a, a.half())
    assert (found.changed, found.nonfinite) == (1, 1)
    assert found.distance == pytest.approx(abs(0.1 - float(np.float16(0.1))) / math.sqrt(1.26), rel=1e-4)
    ids = only(tmp_path, torch.arange(77), torch.arange(77).float())
    assert (ids.changed, ids.distance) == (0, None)


@pytest.mark.parametrize("factor", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 2.0, 0.25])])
def test_fp8_times_its_factors_is_what_counts(tmp_path: Path, factor: Tensor) -> None:
    rows = BLOCK // 2
    plain = torch.randn(3, rows, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    scaled = (plain.float() * factor.reshape(-1, 1)).half()
    found = measured(tmp_path, {"w": plain, "w.scale": factor}, {"w": scaled})["w"]
    assert (found.elements, found.changed, found.distance) == (3 * rows, 0, 0.0)
    both = measured(tmp_path, {"w": plain, "w.scale": factor}, {"w": plain, "w.scale": factor * 2})["w"]
    assert both.distance == pytest.approx(1.0, rel=1e-12)
    assert both.changed == int((plain.float() != 0).sum())


def test_squares_beyond_float64_have_no_distance(tmp_path: Path) -> None:
    a = torch.tensor([1e200, 1.0], dtype=torch.float64)
    found = only(tmp_path, a, -a)
    assert (found.changed, found.nonfinite, found.distance, found.cosine) == (2, 0, None, None)


@pytest.mark.parametrize(
    ("dtype", "count", "nbytes"), [("F4", 8, 4), ("F6_E2M3", 4, 3), ("F8_E8M0", 4, 4), ("C64", 1, 8)]
)
def test_types_that_torch_does_not_compute_with(tmp_path: Path, dtype: str, count: int, nbytes: int) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [count], "data_offsets": [0, nbytes]}}).encode()
    for name, last in (("a", 0), ("b", 1)):
        data = bytes(nbytes - 1) + bytes([last])
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    with open_source(tmp_path / "a.safetensors") as a, open_source(tmp_path / "b.safetensors") as b:
        (found,) = compare([(Read(a, "x"), Read(b, "x"))], 1, lambda _: None)
        (same,) = compare([(Read(a, "x"), Read(a, "x"))], 1, lambda _: None)
    assert (found.changed, found.distance, same.changed) == (1, None, 0)


def test_progress_tells_every_byte(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(BLOCK + 5, dtype=torch.float16), "y": torch.zeros(3)}, tmp_path / "a.safetensors")
    told: list[int] = []
    with open_source(tmp_path / "a.safetensors") as a:
        compare([(Read(a, name), Read(a, name)) for name in "xy"], 2, told.append)
    assert sum(told) == 2 * (2 * (BLOCK + 5) + 12)


def test_an_error_in_a_thread_is_raised_here(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as a, pytest.raises(KeyError):
        compare([(Read(a, "x"), Read(a, "x", "none"))], 2, lambda _: None)


def test_sums_add_up_exactly() -> None:
    parts = [Measures(1, 1, 1, 0, value, 1.0, 1.0, 0.0) for value in (1e16, 1.0, -1e16)]
    assert Measures.of(parts).aa == 1.0
    assert Measures.of(parts[::-1]) == Measures.of(parts)
    assert Measures.of([]) == Measures()
