"""Dot products against numpy's longer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdkernels import reduce

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def tensors(shape: tuple[int, ...], n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(n)
    return [(torch.randn(shape, generator=source, dtype=torch.float64) + 0.1).to(dtype) for _ in range(n)]


def exact(values: list[Tensor], center: Tensor | None) -> np.ndarray:
    middle = 0 if center is None else center.double().numpy().ravel()
    rows = np.stack([x.double().numpy().ravel() - middle for x in values]).astype(np.longdouble)
    return np.array([[(a * b).sum() for b in rows] for a in rows], dtype=np.float64)


def assert_close(got: Tensor, want: np.ndarray) -> None:
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-300)
    assert float(np.abs(got.numpy() - want).max(initial=0.0)) <= 1e-13 * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_whole_tensors(dtype: torch.dtype, n: int) -> None:
    values = tensors((70, 501), n, dtype)
    got = reduce.gram(values)
    assert got.dtype == torch.float64
    assert_close(got, exact(values, None))
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("shape", [(4, 20_000), (3000, 7), (9,), (5, 3, 2, 2), (1, 40_000)])
@pytest.mark.parametrize("centered", [True, False])
def test_rows(shape: tuple[int, ...], centered: bool) -> None:
    *values, center = tensors(shape, 4, torch.float64)
    middle = center if centered else None
    got = reduce.gram(values, middle, rows=True)
    assert got.shape == (shape[0], 3, 3)
    for i in range(0, shape[0], max(1, shape[0] // 5)):
        assert_close(got[i], exact([x[i] for x in values], None if middle is None else middle[i]))


def test_center_is_subtracted_before_the_product() -> None:
    base = torch.full((1000,), 1000.0)
    a, b = base + 2.0**-10, base - 2.0**-10
    want = 1000 * 2.0**-20
    assert reduce.gram([a, b], base).tolist() == [[want, -want], [-want, want]]


def test_sums_are_longer_than_float32() -> None:
    x = torch.full((1 << 16,), 4097.0)
    assert reduce.gram([x]).item() == 4097.0**2 * (1 << 16)


def test_mixed_types() -> None:
    a, b, c = tensors((3, 5), 3)
    got = reduce.gram([a.half(), b.bfloat16()], c)
    assert_close(got, exact([(a.half().float() - c), (b.bfloat16().float() - c)], None))


@pytest.mark.parametrize(("shape", "rows", "want"), [
    ((0,), False, (2, 2)), ((0, 3), True, (0, 2, 2)), ((3, 0), True, (3, 2, 2)), ((0,), True, (0, 2, 2)),
])  # fmt: skip
def test_nothing_is_zero(shape: tuple[int, ...], rows: bool, want: tuple[int, ...]) -> None:
    got = reduce.gram([torch.ones(shape)] * 2, torch.ones(shape), rows=rows)
    assert torch.equal(got, torch.zeros(want, dtype=torch.float64))


def test_a_number_is_one_row() -> None:
    values = [torch.tensor(2.0), torch.tensor(3.0)]
    assert reduce.gram(values).tolist() == [[4, 6], [6, 9]]
    assert reduce.gram(values, rows=True).tolist() == [[[4, 6], [6, 9]]]


def test_same_bytes_with_two_threads_and_other_strides() -> None:
    values = tensors((600, 700), 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole, rows = reduce.gram(values), reduce.gram(values, rows=True)
        torch.set_num_threads(2)
        assert torch.equal(reduce.gram(values), whole)
        assert torch.equal(reduce.gram(values, rows=True), rows)
        assert torch.equal(reduce.gram([x.T.contiguous().T for x in values]), whole)
    finally:
        torch.set_num_threads(threads)
