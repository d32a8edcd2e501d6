"""mergekit's YAML means the same here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdmerge import mergekit
from sdmerge.errors import RequestError
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path

TIES = """
models:
  - model: a.safetensors
    parameters: {density: 0.5, weight: 0.5}
  - model: b.safetensors
    parameters: {weight: [{filter: attn2, value: 0.25}, {value: 1.0}]}
  - model: c.safetensors
base_model: c.safetensors
merge_method: ties
parameters: {normalize: false, int8_mask: true, lambda: 0.9}
dtype: float16
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        toys.saved(tmp_path, name, seed, torch.float32)
    return tmp_path


def run(folder: Path, text: str) -> dict[str, torch.Tensor]:
    (folder / "kit.yaml").write_text(text, encoding="utf-8")
    sdmerge.run_recipe(folder / "kit.yaml", output=folder / "out.safetensors", overwrite=True)
    return load_file(folder / "out.safetensors")


def test_ties_with_everything(folder: Path) -> None:
    got = run(folder, TIES)
    weights = sdmerge.Weights.from_yaml({"value": 1.0, "rules": ["*attn2*:0.25"]})
    values = {"density": (0.5, 1.0), "weights": (0.5, weights), "normalize": False, "lam": 0.9}
    a, b, c = (folder / f"{name}.safetensors" for name in "abc")
    sdmerge.merge("ties", [a, b], values, base=c, output=folder / "ours.safetensors", dtype="fp16")
    ours = load_file(folder / "ours.safetensors")
    assert all(torch.equal(got[name], ours[name]) for name in ours)


def test_slerp_begins_at_the_base_and_takes_gradients(folder: Path) -> None:
    text = """
models: [{model: a.safetensors}, {model: b.safetensors}]
merge_method: slerp
base_model: b.safetensors
parameters: {t: [0, 1]}
"""
    got = run(folder, text)
    a, b = (load_file(folder / f"{name}.safetensors") for name in "ab")
    first, last = toys.CONV_IN, toys.UNET + "out.2.weight"
    torch.testing.assert_close(got[first], b[first])
    torch.testing.assert_close(got[last], a[last])


@pytest.mark.parametrize("method", sorted(set(mergekit._METHODS) - {"slerp", "nearswap"}))
def test_every_method_runs(folder: Path, method: str) -> None:
    models = (
        "[{model: a.safetensors}]" if method == "arcee_fusion" else "[{model: a.safetensors}, {model: b.safetensors}]"
    )
    base = "" if method in ("linear", "karcher") else "base_model: c.safetensors\n"
    got = run(folder, f"models: {models}\nmerge_method: {method}\n{base}")
    assert got[toys.TO_K].isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"merge_method": "tise"}, "did you mean 'ties'"),
        ({"slices": [1]}, "language models"),
        ({"parameters": {"densty": 1}}, "did you mean 'density'"),
        ({"models": []}, "no list of models"),
        ({"models": [{"model": "a+lora"}]}, "adapters behind a"),
        ({"models": [{"mdl": "a"}]}, "has no name"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"modles": 1}, "did you mean 'models'"),
        ({"parameters": {"density": ["x"]}}, "no gradient"),
        ({"parameters": {"density": [{"filter": "q", "value": 1}]}}, "without a value"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, object], says: str) -> None:
    data = {"merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}], "base_model": "c", **change}
    with pytest.raises(RequestError, match=says):
        mergekit.translated(data)
