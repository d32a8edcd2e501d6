"""Every method's output is derived again, bit for bit; what was changed since is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdmerge
from sdmerge import methods as _registered  # noqa: F401 - registers them
from sdmerge import worker
from sdmerge.errors import MismatchError, RequestError
from sdmerge.method import METHODS
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BLOCK", 64)
    monkeypatch.setattr(worker, "SUM_BLOCK", 32)
    monkeypatch.setattr(worker, "RUN", 128)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [toys.saved(tmp_path, name, seed) for seed, name in enumerate("abcd")]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_same_bytes_whatever_the_threads(name: str, models: list[Path], tmp_path: Path) -> None:
    method = METHODS[name]
    count = len(method.models) or max(2, method.at_least)
    base = models[3] if method.base == "required" else None
    found = []
    for folder, threads in (("1", 1), ("2", 8), ("3", 8)):
        out = tmp_path / folder / "out.safetensors"
        out.parent.mkdir()
        sdmerge.merge(name, models[:count], base=base, output=out, threads=threads)
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]
    verdict = sdmerge.verify(out, inputs=tmp_path, threads=2)
    assert verdict.identical, verdict.different
    assert verdict.tensors == len(load_file(out))


@pytest.fixture
def merged(models: list[Path], tmp_path: Path) -> Path:
    out = tmp_path / "out.safetensors"
    sdmerge.add_difference(*models[:3], alpha=0.7, output=out)
    return out


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return dict(file.metadata())


def test_one_changed_bit_is_found(merged: Path) -> None:
    tensors, texts = load_file(merged), _metadata(merged)
    tensors[toys.TO_K].view(torch.int16)[3, 1] ^= 1
    save_file(tensors, str(merged), metadata=texts)
    verdict = sdmerge.verify(merged)
    assert not verdict.identical
    assert verdict.different == (toys.TO_K,)


def test_missing_extra_and_retyped_tensors_are_told(merged: Path) -> None:
    tensors, texts = load_file(merged), _metadata(merged)
    del tensors[toys.TO_K]
    tensors["more"] = torch.zeros(1)
    tensors[toys.CONV_IN] = tensors[toys.CONV_IN].float()
    save_file(tensors, str(merged), metadata=texts)
    verdict = sdmerge.verify(merged)
    assert set(verdict.missing) == {toys.TO_K, toys.CONV_IN}
    assert set(verdict.extra) == {"more", toys.CONV_IN}


def test_renamed_inputs_are_found_by_their_fingerprints(merged: Path, models: list[Path]) -> None:
    models[1].rename(models[1].with_name("renamed.safetensors"))
    verdict = sdmerge.verify(merged)
    assert verdict.identical
    assert verdict.inputs["B"].name == "renamed.safetensors"


def test_another_input_under_the_name_is_refused(merged: Path, models: list[Path]) -> None:
    toys.saved(models[1].parent, "b", 99)
    with pytest.raises(MismatchError, match="is not the B that was merged"):
        sdmerge.verify(merged)


def test_a_missing_input_is_named(merged: Path, models: list[Path]) -> None:
    models[2].unlink()
    with pytest.raises(RequestError, match=r"c\.safetensors: the input C is not there"):
        sdmerge.verify(merged)


def test_a_file_without_recipe_is_refused(models: list[Path]) -> None:
    with pytest.raises(RequestError, match="carries no recipe"):
        sdmerge.verify(models[0])


@pytest.mark.parametrize(
    "recipe", ["{", "[]", '{"merge": 1}', '{"merge": {"method": "x", "models": []}}', "[" * 100_000]
)
def test_a_hostile_recipe_is_one_line(merged: Path, recipe: str) -> None:
    texts = {**_metadata(merged), "sdmerge.recipe": recipe}
    save_file(load_file(merged), str(merged), metadata=texts)
    with pytest.raises(RequestError, match="recipe cannot be read"):
        sdmerge.verify(merged)


def test_names_in_a_file_do_not_lead_out_of_the_folder(merged: Path, tmp_path: Path) -> None:
    texts = _metadata(merged)
    entries = json.loads(texts["sdmerge.inputs"])
    entries[0]["name"] = "../../etc/a.safetensors"
    save_file(load_file(merged), str(merged), metadata={**texts, "sdmerge.inputs": json.dumps(entries)})
    assert sdmerge.verify(merged).inputs["A"] == tmp_path / "a.safetensors"
