"""Rotation and truncation against plain SVDs, and by what defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdmerge.methods import _shared, matrix
from sdmerge.methods.matrix import rotate, truncate_rank
from tests.sdmerge.methods.calls import random

TALL, SQUARE, WIDE, CONV = (40, 7), (12, 12), (6, 15), (6, 5, 3, 3)


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    a = random(shape, 1, torch.float64)
    return a, a + random(shape, 2, torch.float64)


def as_rows(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy().reshape((-1, 9) if x.ndim == 4 else (x.shape[0], -1))


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE, CONV], ids=str)
@pytest.mark.parametrize("centralization", [0.0, 0.5, 1.0])
def test_rotated_onto_b(shape: tuple[int, ...], centralization: float) -> None:
    a, b = pair(shape)
    x, y = as_rows(a), as_rows(b)
    mean_x, mean_y = centralization * x.mean(0), centralization * y.mean(0)
    u, _, vh = np.linalg.svd((x - mean_x).T @ (y - mean_y))
    result = as_rows(rotate(a, b, centralization=centralization))
    if shape == WIDE:  # the transform is free outside the rows' space
        rank = 6 - (centralization == 1)
        u, vh = u[:, :rank], vh[:rank]
    np.testing.assert_allclose(result, (x - mean_x) @ u @ vh + mean_y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE, CONV], ids=str)
def test_parts_of_the_way(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    x, y = as_rows(a), as_rows(b)
    lengths = np.linalg.norm(x - x.mean(0))
    distances = []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        part = as_rows(rotate(a, b, alignment=t))
        np.testing.assert_allclose(part.mean(0), (1 - t) * x.mean(0) + t * y.mean(0), atol=1e-9)
        centred = part - part.mean(0)
        np.testing.assert_allclose(np.linalg.norm(centred), lengths, rtol=1e-9)
        np.testing.assert_allclose(centred @ centred.T, (x - x.mean(0)) @ (x - x.mean(0)).T, atol=1e-8)  # a rotation
        distances.append(np.linalg.norm(centred - (y - y.mean(0))))
    assert distances[0] > distances[2] > distances[4]
    np.testing.assert_array_equal(as_rows(rotate(a, b, alignment=0.0)), x)


def test_half_of_a_known_rotation() -> None:
    def around(angle: float, other: float) -> torch.Tensor:
        return torch.tensor(
            [
                [math.cos(angle), math.sin(angle), 0, 0],
                [-math.sin(angle), math.cos(angle), 0, 0],
                [0, 0, math.cos(other), math.sin(other)],
                [0, 0, -math.sin(other), math.cos(other)],
            ],
            dtype=torch.float64,
        )

    a = random((20, 4), 1, torch.float64)
    a -= a.mean(0)
    for angles in ((2.0, -0.6), (1.0, 1.0), (3.0, 0.0), (0.4, 1.0)):  # the last two fold onto each other at φ = 0.7
        whole, half = a @ around(*angles), a @ around(angles[0] / 2, angles[1] / 2)
        torch.testing.assert_close(rotate(a, whole), whole)
        torch.testing.assert_close(rotate(a, whole, alignment=0.5), half)


def test_rows_that_span_other_spaces_turn_the_shortest_way() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64)
    third = rotate(a, b, alignment=1 / 3, centralization=0.0)
    torch.testing.assert_close(third, torch.tensor([[math.sqrt(0.75), 0.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(rotate(a, b, centralization=0.0), b / 3)


def test_opposite_and_no_direction() -> None:
    a = random((9, 4), 1, torch.float64)
    a -= a.mean(0)
    torch.testing.assert_close(rotate(a, -a), -a)
    torch.testing.assert_close(rotate(a, -a, alignment=0.5), torch.zeros_like(a))  # no shorter side: cos(π/2)
    torch.testing.assert_close(rotate(a, 2 * a, alignment=0.5), a)
    torch.testing.assert_close(rotate(a, torch.zeros_like(a), alignment=0.5), a)  # nothing to turn to


def test_a_reflection_only_all_the_way() -> None:
    a = random((30, 3), 1, torch.float64)
    a -= a.mean(0)
    mirrored = a * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(rotate(a, mirrored), mirrored)
    almost = rotate(a, mirrored, alignment=0.999)
    torch.testing.assert_close(almost @ almost.T, a @ a.T)
    turn = torch.linalg.lstsq(a, almost).solution
    assert torch.linalg.det(turn) > 0.99


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE, CONV], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_alpha_takes_from_b(shape: tuple[int, ...], alpha: float) -> None:
    a, b = pair(shape)
    only_b = rotate(a, b, alignment=0.0, alpha=1.0)  # B, turned back onto A
    back = rotate(b, a)
    if shape != SQUARE:  # there the sign of the last direction is free, and chosen to make a rotation
        only_b, back = only_b - as_mean(a), back - as_mean(a)
    torch.testing.assert_close(only_b, back, rtol=1e-7, atol=1e-7)
    blended = rotate(a, b, alignment=0.0, alpha=alpha)
    torch.testing.assert_close(blended, torch.lerp(a, rotate(a, b, alignment=0.0, alpha=1.0), alpha))
    torch.testing.assert_close(rotate(a, b, alignment=1.0, alpha=1.0), b, rtol=0, atol=0)
    near = rotate(a, b, alignment=1.0, alpha=1 - 1e-9)
    torch.testing.assert_close(near, b, rtol=1e-6, atol=1e-6)


def as_mean(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(as_rows(x).mean(0)).reshape((3, 3) if x.ndim == 4 else (-1,))


def test_vectors_are_blended() -> None:
    a, b = random((9,), 1), random((9,), 2)
    torch.testing.assert_close(rotate(a, b, alpha=0.25), torch.lerp(a, b, 0.25))
    assert torch.equal(rotate(a, b), a)


def test_rotation_of_what_was_learned() -> None:
    a, b = pair(TALL)
    base = random(TALL, 5, torch.float64)
    for t in (0.4, 1.0):
        torch.testing.assert_close(rotate(a, b, base=base, alignment=t), base + rotate(a - base, b - base, alignment=t))


def test_power_keeps_many_angles_apart() -> None:
    q = torch.linalg.qr(random((60, 60), 3, torch.float64)).Q
    if torch.linalg.det(q) < 0:
        q[0] *= -1
    half = matrix._power(q, 0.5)
    torch.testing.assert_close(half @ half, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(half @ half.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE, CONV, (3, 2, 5)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("based", [True, False])
def test_truncate_rank(shape: tuple[int, ...], rank: int, based: bool) -> None:
    a, base = random(shape, 1), random(shape, 2)
    origin = base.double() if based else torch.zeros(shape, dtype=torch.float64)
    u, s, vh = np.linalg.svd((a.double() - origin).numpy().reshape(shape[0], -1), full_matrices=False)
    expected = origin.numpy() + ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(shape)
    result = truncate_rank(a, base=base if based else None, rank=rank)
    assert result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_truncate_rank_at_its_ends() -> None:
    a, base = random((6, 9), 1), random((6, 9), 2)
    assert torch.equal(truncate_rank(a, base=base, rank=6), a)
    assert torch.equal(truncate_rank(a, base=base, rank=0), base)
    assert torch.equal(truncate_rank(a, rank=0), torch.zeros(6, 9))
    assert torch.equal(truncate_rank(a[0], base=base[0], rank=1), a[0])
    low = base + random((6, 2), 3) @ random((2, 9), 4)
    torch.testing.assert_close(truncate_rank(low, base=base, rank=2), low)
    one = random((6, 9), 1)
    kept = truncate_rank(one, rank=6)
    assert torch.equal(kept, one)
    assert kept.data_ptr() != one.data_ptr()


def test_equal_singular_values_keep_some() -> None:
    result = truncate_rank(torch.eye(5, dtype=torch.float64), rank=2)
    torch.testing.assert_close(result @ result, result)  # a projection
    assert abs(float(result.trace()) - 2) < 1e-9


@pytest.mark.parametrize("shape", [TALL, WIDE, CONV], ids=str)
def test_in_blocks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(shape)
    whole = rotate(a, b, alignment=0.5), truncate_rank(a, base=b, rank=3)
    monkeypatch.setattr(_shared, "BLOCK", 50)
    blocks = rotate(a, b, alignment=0.5), truncate_rank(a, base=b, rank=3)
    torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_what_is_not_finite_gives_nan(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    a[3, 2] = math.inf
    assert rotate(a, b).isnan().all()
    assert rotate(b, a, alignment=0.5).isnan().all()
    assert truncate_rank(a, base=b, rank=2).isnan().all()
