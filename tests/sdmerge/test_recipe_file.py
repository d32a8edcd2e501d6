"""Recipes: what they do is what their parts do; what is wrong with them is one line with the nearest name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdmerge
from sdmerge import recipe_file
from sdmerge.errors import MismatchError, RequestError
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        toys.saved(tmp_path, name, seed, torch.float32)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


NESTED = """
models:
  a: a.safetensors
  b: {path: b.safetensors}
set: {alpha: 0.25}
merge:
  method: add_difference
  models: [a, {method: weighted_sum, models: [b, c.safetensors], parameters: {alpha: 0.75}}, b]
  parameters: {alpha: $alpha}
dtype: fp16
output: out.safetensors
"""


def test_a_nested_recipe_is_one_pass_without_rounding_between(folder: Path) -> None:
    report = sdmerge.run_recipe(write(folder, NESTED), changes={"alpha": 0.5})[0]
    assert report.output == folder / "out.safetensors"
    got = load_file(report.output)
    a, b, c = (load_file(folder / f"{name}.safetensors") for name in "abc")
    for name in (toys.TO_K, toys.CONV_IN):
        x, y, z = (m[name].double() for m in (a, b, c))
        want = x + 0.5 * ((0.25 * y + 0.75 * z) - y)
        assert (got[name].double() - want).abs().max() <= 2.0**-11 * want.abs().max()
        assert got[name].dtype == torch.float16
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.safetensors", "b.safetensors", "c.safetensors", "out.safetensors", "recipe.yaml",
    ]  # fmt: skip
    assert sdmerge.verify(report.output).identical


def test_an_option_overrides_the_recipe(folder: Path) -> None:
    out = folder / "other.safetensors"
    sdmerge.run_recipe(write(folder, NESTED), output=out, dtype="bf16")
    assert load_file(out)[toys.TO_K].dtype == torch.bfloat16


def test_a_sweep_over_what_is_set_equals_single_runs(folder: Path) -> None:
    recipe = write(folder, NESTED)
    reports = sdmerge.run_recipe(recipe, over={"alpha": [0.0, 0.5]})
    assert [report.output.name for report in reports] == ["out-alpha0.safetensors", "out-alpha0.5.safetensors"]
    single = folder / "single" / "out-alpha0.5.safetensors"
    single.parent.mkdir()
    sdmerge.run_recipe(recipe, output=single, changes={"alpha": 0.5})
    assert single.read_bytes() == reports[1].output.read_bytes()


def test_block_weights_in_a_recipe(folder: Path) -> None:
    text = """
merge:
  method: weighted_sum
  models: [a.safetensors, b.safetensors]
  parameters: {alpha: {value: 0, te: 1, blocks: {IN01: 1}, rules: ["*.proj_out.*:0.5"]}}
output: out.safetensors
"""
    sdmerge.run_recipe(write(folder, text))
    a, b, got = (load_file(folder / f"{name}.safetensors") for name in ("a", "b", "out"))
    text_name = toys.TE + "final_layer_norm.weight"
    proj_out = toys.UNET + "middle_block.1.proj_out.weight"
    assert torch.equal(got[toys.TO_K], b[toys.TO_K])
    assert torch.equal(got[text_name], b[text_name])
    assert torch.equal(got[toys.CONV_IN], a[toys.CONV_IN])
    torch.testing.assert_close(got[proj_out], (a[proj_out] + b[proj_out]) / 2)
    assert sdmerge.verify(folder / "out.safetensors").identical


def test_a_sha256_is_held_against_the_file(folder: Path) -> None:
    import hashlib

    digest = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    for sha256, good in ((digest.upper(), True), ("0" * 64, False)):
        text = f"""
models: {{a: {{path: a.safetensors, sha256: "{sha256}"}}}}
merge: {{method: weighted_sum, models: [a, b.safetensors]}}
output: {"good" if good else "bad"}.safetensors
"""
        if good:
            sdmerge.run_recipe(write(folder, text))
        else:
            with pytest.raises(MismatchError, match="the recipe expects 0000"):
                sdmerge.run_recipe(write(folder, text))
    assert not (folder / "bad.safetensors").exists()


MODELS = "models: [a.safetensors, b.safetensors]"


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        (f"{{method: weighted_smu, {MODELS}}}", "did you mean 'weighted_sum'"),
        (f"{{method: weighted_sum, {MODELS}, parameters: {{alhpa: 1}}}}", "did you mean 'alpha'"),
        (f"{{method: weighted_sum, {MODELS}, parameters: {{alpha: high}}}}", "alpha is 'high'"),
        (f"{{method: ties, {MODELS}, base: c.safetensors, parameters: {{density: 1.5}}}}", "density is 1.5"),
        (f"{{method: ties, {MODELS}}}", "needs a base model"),
        (f"{{method: slerp, {MODELS}, base: c.safetensors}}", "takes no base"),
        ("{method: add_difference, models: [a.safetensors]}", "takes 3 models"),
        (f"{{method: weighted_sum, {MODELS}, parameters: {{alpha: {{blocks: {{IN99: 1}}}}}}}}", "IN99"),
        (f"{{method: weighted_sum, {MODELS}, parameters: {{alpha: 'preset:GRAD_X'}}}}", "GRAD_"),
        (f"{{method: weighted_sum, {MODELS}, parameters: {{alpha: $beta}}}}", "not under set"),
        (f"{{metod: weighted_sum, {MODELS}}}", "did you mean 'method'"),
        ("{method: weighted_sum, models: [a.safetensors, bb]}", "no model 'bb'"),
        ("a.safetensors", "only a model"),
        ("[1, 2]", "a merge is list"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, merge: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        sdmerge.run_recipe(write(folder, f"merge: {merge}\noutput: out.safetensors\n"))
    assert "\n" not in str(caught.value)
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge: [", "is no YAML"),
        ("just a text", "recipe is str"),
        ("{}", "lacks 'merge'"),
        ("merge: {}\nmodel: {}", "did you mean 'models'"),
        ("version: 2\nmerge: {}", "expected 1"),
        ("merge: &m {method: weighted_sum, models: [*m, *m]}", "nested more than"),
        ("models: {a: {path: a, sha256: 12}}\nmerge: a", "64 hexadecimal"),
        ("merge: !!python/object/apply:os.system [true]", "is no YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(folder: Path, text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        recipe_file.load(write(folder, text))


def test_changes_must_have_a_name_in_the_recipe(folder: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'alpha'"):
        recipe_file.load(write(folder, NESTED), {"alhpa": 1})


def test_the_metadata_is_a_recipe(folder: Path) -> None:
    weights = sdmerge.Weights(value=0.5, te=0.0, blocks="preset:GRAD_V", rules=("*.attn2.*:0.25",))  # type: ignore[arg-type]
    out = folder / "out.safetensors"
    sdmerge.merge("weighted_sum", [folder / "a.safetensors", folder / "b.safetensors"], {"alpha": weights}, output=out)
    with safe_open(str(out), "pt") as file:
        data: dict[str, Any] = json.loads(file.metadata()["sdmerge.recipe"])
    assert recipe_file.parse(data, folder).merge.values == {"alpha": weights}
