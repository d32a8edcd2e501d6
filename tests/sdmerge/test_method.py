"""`@method` reads everything from the signature and returns the function unchanged."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import load_file

from sdmerge import methods as _registered  # noqa: F401 - registers them
from sdmerge.cli import root
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


def test_the_method_that_contributing_shows_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"^( +)@method.*?^\1    return .*?$", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[0].count("\n") < 10
    names: dict[str, Any] = {"method": method, "Param": Param, "Annotated": Annotated}
    out = tmp_path / "out.safetensors"
    try:
        exec(compile(textwrap.dedent(shown[0]), "CONTRIBUTING.md", "exec", dont_inherit=True), names)
        paths = [toys.saved(tmp_path, str(seed), seed) for seed in range(3)]
        given = [*map(str, paths), "-o", str(out), "-p", "alpha=0.75", "--te", "0"]
        root.main(["merge", "toward_mean", *given], standalone_mode=False)
        root.main(["verify", str(out)], standalone_mode=False)
        root.main(["methods", "toward_mean"], standalone_mode=False)
    finally:
        METHODS.pop("toward_mean", None)
    assert "identical" in (said := capsys.readouterr().out)
    assert "A + α" in said
    got, (a, b, c) = load_file(out), (load_file(path) for path in paths)
    x, y, z = (model[toys.TO_K].double() for model in (a, b, c))
    torch.testing.assert_close(got[toys.TO_K].double(), 0.5 * x + 0.25 * (y + z), rtol=1e-3, atol=1e-6)
    te = toys.TE + "final_layer_norm.weight"
    assert torch.equal(got[te], a[te])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_explains_itself(name: str) -> None:
    found = METHODS[name]
    assert found.summary.endswith(".")
    assert found.formula
    assert found.source
    assert all(parameter.param.help for parameter in found.parameters)
