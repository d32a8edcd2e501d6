"""Ranks from singular values: exact where the answer is known, never over a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdmerge.errors import RequestError
from sdmerge.lora import budget

SPECTRA = {"a": torch.tensor([4.0, 2.0, 1.0, 0.0]), "b": torch.tensor([3.0, 0.0]), "c": torch.zeros(2)}
spectra = st.lists(
    st.lists(st.floats(0, 100), min_size=1, max_size=5).map(lambda v: torch.tensor(sorted(v, reverse=True))),
    min_size=1,
    max_size=4,
)


def error(spectra: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(sigma.double()[ranks[path] :].square().sum()) for path, sigma in spectra.items())


def test_fixed_is_bounded_by_the_components() -> None:
    assert budget.fixed(SPECTRA, 3) == {"a": 3, "b": 2, "c": 2}


def test_energy_and_error_keep_what_they_say() -> None:
    assert budget.by_energy(SPECTRA, 16 / 21) == {"a": 1, "b": 1, "c": 1}
    assert budget.by_energy(SPECTRA, 0.9) == {"a": 2, "b": 1, "c": 1}
    assert budget.by_energy(SPECTRA, 1) == {"a": 3, "b": 1, "c": 1}
    assert budget.by_error(SPECTRA, 0) == {"a": 3, "b": 1, "c": 1}
    assert budget.by_error(SPECTRA, (1.001 / 21) ** 0.5) == {"a": 2, "b": 1, "c": 1}


@given(spectra, st.floats(0.01, 1), st.floats(0, 0.99))
def test_ranks_suffice_and_are_smallest(values: list[torch.Tensor], share: float, bound: float) -> None:
    for sigma in values:
        total = float(sigma.double().square().sum())
        kept = budget.by_energy({"x": sigma}, share)["x"]
        assert float(sigma.double()[:kept].square().sum()) >= share * total * (1 - 1e-12)
        rank = budget.by_error({"x": sigma}, bound)["x"]
        assert float(sigma.double()[rank:].square().sum()) <= bound**2 * total * (1 + 1e-12)
        if rank > 1:
            assert float(sigma.double()[rank - 1 :].square().sum()) > bound**2 * total * (1 - 1e-12)


@given(spectra, st.integers(0, 500), st.integers(1, 9), st.integers(1, 9))
def test_budget_is_never_exceeded_and_nearly_the_best(values: list[torch.Tensor], size: int, m: int, n: int) -> None:
    named = {str(i): sigma for i, sigma in enumerate(values)}
    shapes = {path: (m + int(path), n) for path in named}
    costs = {path: torch.full((sigma.numel(),), 2 * sum(shapes[path])) for path, sigma in named.items()}
    ranks = budget.by_bytes(named, costs, size)

    def taken(of: dict[str, int]) -> int:
        return sum(2 * rank * sum(shapes[path]) for path, rank in of.items())

    assert taken(ranks) <= size
    most = 2 * (m + n + len(named))  # one component more, and nothing smaller is better
    choices = [range(sigma.numel() + 1) for sigma in values]
    within = (dict(zip(named, one, strict=True)) for one in itertools.product(*choices))
    best = min(error(named, one) for one in within if taken(one) <= max(0, size - most))
    assert error(named, ranks) <= best * (1 + 1e-12) + 1e-12


def test_bytes_may_differ_by_module_and_zeros_are_left_out() -> None:
    same = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([2.0, 1.0])}
    costs = {"a": torch.tensor([16, 16]), "b": torch.tensor([8, 8])}
    assert budget.by_bytes(same, costs, 8) == {"a": 0, "b": 1}
    costs = {path: torch.full((sigma.numel(),), 4) for path, sigma in SPECTRA.items()}
    assert budget.by_bytes(SPECTRA, costs, 10_000) == {"a": 3, "b": 1, "c": 0}
    assert budget.by_bytes({}, {}, 10) == {}


def test_components_come_in_order_where_later_ones_are_worth_more() -> None:
    curve, costs = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 0.5])}, torch.tensor([4, 4])
    assert budget.by_bytes(curve, {"a": costs, "b": costs}, 8) == {"a": 1, "b": 1}
    assert budget.by_bytes(curve, {"a": costs, "b": torch.tensor([40, 40])}, 8) == {"a": 2, "b": 0}


@pytest.mark.parametrize("wrong", [{"rank": 1, "size": 2}, {"rank": 0}, {"energy": 0}, {"error": 1}, {"size": -1}])
def test_limits_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        budget.Limit(**wrong)
