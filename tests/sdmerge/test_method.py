"""`@method` reads everything from the signature and returns the function unchanged."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdmerge.errors import RequestError
from sdmerge.method import METHODS, Param, method
from sdmerge.methods import linear
from tests.sdmerge import toys


def test_the_signature_says_it_all() -> None:
    found = METHODS["add_difference"]
    assert found.models == ("a", "b", "c")
    assert [(p.name, p.default) for p in found.parameters] == [("alpha", 1.0)]
    assert (found.base, found.at_least, found.takes_place) == ("no", 3, False)
    assert found.formula == "A + α (B − C)"
    assert found.elementwise
    assert found.summary.startswith("A + alpha (B - C)")
    assert METHODS["linear"].models == ()


def test_methods_are_plain_functions() -> None:
    a, b, c = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])
    assert linear.add_difference(a, b, c, alpha=0.5).item() == 1.5
    assert linear.linear(a, b, weights=(0.75, 0.25)).item() == 1.5
    assert linear.linear(a, b, c, weights=(1.0, 1.0, 1.0), normalize=False).item() == 6.0


def test_a_weight_of_one_returns_its_model() -> None:
    huge, tiny = torch.tensor([1e20]), torch.tensor([1.0])
    assert linear.linear(huge, tiny, weights=(0.0, 1.0)).item() == 1.0
    assert linear.linear(tiny, huge, weights=(1.0, 0.0)).item() == 1.0


def test_equal_models_give_themselves() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear.linear(x, x, x, weights=(0.5, 0.3, 0.2)), x)


@pytest.mark.parametrize(
    ("method", "count", "values", "says"),
    [
        ("add_difference", 2, {}, "takes 3 models"),
        ("add_difference", 3, {"beta": 1.0}, "no parameter 'beta'"),
        ("add_difference", 3, {"alpha": float("nan")}, "alpha is nan"),
        ("add_difference", 3, {"alpha": "1"}, "alpha is '1'"),
        ("linear", 2, {"weights": (0.5, float("inf"))}, "weights is .*inf"),
        ("linear", 3, {"weights": (0.5, 0.5)}, "2 weights for 3 models"),
        ("weighted_sum", 2, {"alpah": 0.5}, "did you mean 'alpha'"),
    ],
)
def test_wrong_requests_are_named(method: str, count: int, values: dict[str, object], says: str) -> None:
    def ask() -> None:
        METHODS[method].check_models(count, base=False)
        METHODS[method].check(count, values)

    with pytest.raises(RequestError, match=says):
        ask()


def test_the_method_that_contributing_shows_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"^( +)@method.*?^\1    return .*?$", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    names: dict[str, Any] = {"method": method, "Param": Param, "Annotated": Annotated}
    try:
        exec(compile(textwrap.dedent(shown[0]), "CONTRIBUTING.md", "exec", dont_inherit=True), names)
        paths = [toys.saved(tmp_path, str(seed), seed) for seed in range(3)]
        sdmerge.merge("sum_twice", paths, {"alpha": 1.0, "beta": 0.25}, output=tmp_path / "out.safetensors")
    finally:
        METHODS.pop("sum_twice", None)
    got = load_file(tmp_path / "out.safetensors")[toys.TO_K]
    b, c = (load_file(path)[toys.TO_K].double() for path in paths[1:])
    assert torch.equal(got, (0.75 * b + 0.25 * c).half())
