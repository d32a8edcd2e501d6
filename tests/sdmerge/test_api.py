"""The python API: metadata, refusals, dry runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdmerge
from sdformats.errors import OutputExists
from sdmerge.errors import RequestError
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [toys.saved(tmp_path, name, seed) for seed, name in enumerate("abc")]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata())


def test_the_recipe_is_enough_to_run_again(tmp_path: Path, models: list[Path]) -> None:
    out = tmp_path / "merged.safetensors"
    sdmerge.add_difference(*models, alpha=0.7, output=out, dtype="bf16", missing="error")
    found = metadata(out)
    recipe = json.loads(found["sdmerge.recipe"])
    assert recipe["merge"] == {"method": "add_difference", "models": ["A", "B", "C"], "parameters": {"alpha": 0.7}}
    assert (recipe["dtype"], recipe["missing"]) == ("bf16", "error")
    again = tmp_path / "again" / "merged.safetensors"
    again.parent.mkdir()
    (tmp_path / "recipe.yaml").write_text(found["sdmerge.recipe"], encoding="utf-8")  # JSON is YAML
    sdmerge.run_recipe(tmp_path / "recipe.yaml", output=again)
    assert again.read_bytes() == out.read_bytes()


def test_inputs_are_identified_without_their_folders(tmp_path: Path, models: list[Path]) -> None:
    out = tmp_path / "merged.safetensors"
    sdmerge.add_difference(*models, output=out)
    found = metadata(out)
    inputs = json.loads(found["sdmerge.inputs"])
    assert [(e["id"], e["name"], e["size"]) for e in inputs] == [
        (label, path.name, path.stat().st_size) for label, path in zip("ABC", models, strict=True)
    ]
    assert len({e["fingerprint"] for e in inputs}) == 3
    assert all("sha256" not in e for e in inputs)
    assert str(tmp_path) not in json.dumps(found)
    assert found["format"] == "pt"
    assert found["modelspec.title"] == "merged"
    assert found["modelspec.merged_from"] == "a, b, c"
    assert found["modelspec.architecture"] == "stable-diffusion-v1"


def test_hash_adds_the_sha256(tmp_path: Path, models: list[Path]) -> None:
    import hashlib

    out = tmp_path / "merged.safetensors"
    sdmerge.weighted_sum(models[:2], output=out, hash_inputs=True)
    found = metadata(out)
    want = [hashlib.sha256(path.read_bytes()).hexdigest() for path in models[:2]]
    assert [e["sha256"] for e in json.loads(found["sdmerge.inputs"])] == want
    assert list(json.loads(found["sd_merge_models"])) == want
    recipe = json.loads(found["sd_merge_recipe"])
    assert (recipe["primary_model_hash"], recipe["interp_method"], recipe["multiplier"]) == (
        want[0],
        "Weighted sum",
        0.5,
    )


def test_shards_are_hashed_by_name(tmp_path: Path, models: list[Path]) -> None:
    tensors = toys.toy(0)
    names = sorted(tensors)
    halves = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for shard, held in halves.items():
        toys.save(tmp_path / shard, {name: tensors[name] for name in held})
    placed = {name: shard for shard, held in halves.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    out = tmp_path / "merged.safetensors"
    sdmerge.weighted_sum([index, models[1]], output=out, hash_inputs=True)
    assert set(json.loads(metadata(out)["sdmerge.inputs"])[0]["sha256"]) == set(halves)


def test_a_merge_of_merges_remembers_both(tmp_path: Path, models: list[Path]) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    sdmerge.weighted_sum(models[:2], output=first)
    sdmerge.weighted_sum([first, models[2]], output=second)
    inputs = json.loads(metadata(second)["sdmerge.inputs"])
    assert json.loads(inputs[0]["recipe"])["merge"]["method"] == "weighted_sum"
    assert "recipe" not in inputs[1]


def test_normalized_weights(tmp_path: Path, models: list[Path]) -> None:
    one, two = tmp_path / "1" / "o.safetensors", tmp_path / "2" / "o.safetensors"
    for path in (one, two):
        path.parent.mkdir()
    sdmerge.weighted_sum(models, weights=(2, 1, 1), normalize=True, output=one)
    sdmerge.weighted_sum(models, weights=(0.5, 0.25, 0.25), output=two)
    first, second = load_file(one), load_file(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weights": (0.5, 0.5)}, "2 weights for 3 models"),
        ({"alpha": 0.5}, "3 models need"),
        ({"weights": (0.5, 0.3, 0.2), "alpha": 0.5}, "exclude each other"),
        ({"weights": (1, -1, 0), "normalize": True}, "add up to 0"),
        ({"weights": (1, 1, 1), "dtype": "int4"}, "dtype is 'int4'"),
        ({"weights": (1, 1, 1), "threads": 0}, "threads is 0"),
        ({"weights": (1, 1, 1), "output": "out.ckpt"}, "expected one that ends in .safetensors"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, models: list[Path], arguments: dict[str, object], says: str) -> None:
    arguments = {"output": "out.safetensors", **arguments}
    arguments["output"] = tmp_path / str(arguments["output"])
    with pytest.raises(RequestError, match=says):
        sdmerge.weighted_sum(models, **arguments)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 3


def test_unknown_methods_are_named(tmp_path: Path, models: list[Path]) -> None:
    with pytest.raises(RequestError, match="no method 'blend'"):
        sdmerge.merge("blend", models, {}, output=tmp_path / "out.safetensors")


def test_nothing_is_overwritten_unasked(tmp_path: Path, models: list[Path]) -> None:
    before = models[0].read_bytes()
    with pytest.raises(OutputExists, match="is the input"):
        sdmerge.add_difference(*models, output=models[0])
    link = tmp_path / "link.safetensors"
    link.hardlink_to(models[0])
    with pytest.raises(OutputExists, match="is the input"):
        sdmerge.add_difference(*models, output=link)
    assert models[0].read_bytes() == before
    sdmerge.add_difference(*models, output=models[0], overwrite=True)
    assert models[0].read_bytes() != before


def test_a_dry_run_decides_and_writes_nothing(tmp_path: Path, models: list[Path]) -> None:
    report = sdmerge.add_difference(*models, output=tmp_path / "out.safetensors", dry_run=True)
    assert not report.written
    assert report.counts == {"merge": len(toys.shapes()), "copy": 1}
    assert len(list(tmp_path.iterdir())) == 3


def test_converting_what_could_be_two_things_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "v.pt", tmp_path / "v.safetensors"
    torch.save(torch.ones(1, 768), path)
    with pytest.raises(RequestError, match=r"--as embedding\|aesthetic"):
        sdmerge.convert(path, out)
    assert not out.exists()
    sdmerge.convert(path, out, kind="aesthetic")
    assert out.exists()
