"""Sweeps: several outputs over one read of the inputs, each the bytes of its single run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

import sdmerge
from sdformats.errors import FormatError
from sdformats.safetensors import SafetensorsSource
from sdmerge.api import swept_name
from sdmerge.cli import weights
from sdmerge.errors import RequestError
from sdmerge.method import find
from tests.sdmerge import toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [toys.saved(tmp_path, name, seed) for seed, name in enumerate("abc")]


@pytest.mark.parametrize("method", ["add_difference", "ties"])
def test_the_inputs_are_read_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    reads: Counter[tuple[str, str, int]] = Counter()
    plain = SafetensorsSource.read_into

    def counted(self: SafetensorsSource, name: str, offset: int, buffer: memoryview) -> None:
        reads[self.path.name, name, offset] += 1
        plain(self, name, offset, buffer)

    monkeypatch.setattr(SafetensorsSource, "read_into", counted)
    parameter = {"add_difference": "alpha", "ties": "lam"}[method]
    base = models[2] if method == "ties" else None
    given = models[:2] if base else models
    reports = sdmerge.sweep(method, given, {parameter: [0.0, 0.5, 1.0]}, base=base, output=tmp_path / "out.safetensors")
    assert len(reports) == 3
    assert set(reads.values()) == {1}


def test_each_output_is_what_a_single_run_writes(models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "swept" / "m{alpha}.safetensors"
    output.parent.mkdir()
    reports = sdmerge.sweep("add_difference", models, {"alpha": [0.25, 1.0]}, output=output)
    assert [report.output.name for report in reports] == ["m0.25.safetensors", "m1.safetensors"]
    for report, alpha in zip(reports, (0.25, 1.0), strict=True):
        single = tmp_path / report.output.name
        sdmerge.add_difference(*models, alpha=alpha, output=single)
        assert single.read_bytes() == report.output.read_bytes()


def test_several_parameters_give_every_combination(models: list[Path], tmp_path: Path) -> None:
    over = {"density": [0.5, 1.0], "lam": [0.5, 1.0]}
    out = tmp_path / "o.safetensors"
    reports = sdmerge.sweep("ties", models[:2], over, base=models[2], output=out)
    assert [report.output.name for report in reports] == [
        "o-density0.5-lam0.5.safetensors",
        "o-density0.5-lam1.safetensors",
        "o-density1-lam0.5.safetensors",
        "o-density1-lam1.safetensors",
    ]


def test_one_bad_output_leaves_none(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "o-alpha1.safetensors").write_bytes(b"mine")
    with pytest.raises(FormatError, match="exists already"):
        sdmerge.sweep("add_difference", models, {"alpha": [0.0, 1.0]}, output=tmp_path / "o.safetensors")
    assert not (tmp_path / "o-alpha0.safetensors").exists()
    assert (tmp_path / "o-alpha1.safetensors").read_bytes() == b"mine"


def test_outputs_of_one_name_are_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="two outputs"):
        sdmerge.sweep("add_difference", models, {"alpha": [0.5, 0.5]}, output=tmp_path / "o.safetensors")


def test_names_without_suffix(tmp_path: Path) -> None:
    assert swept_name(tmp_path / "folder", {"alpha": 0.5}).name == "folder-alpha0.5"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("alpha=0:1:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("alpha=1:0:-0.5", [1.0, 0.5, 0.0]),
        ("alpha=0.2,0.7", [0.2, 0.7]),
        ("alpha=0:0.5:0.2", [0.0, 0.2, 0.4]),
    ],
)
def test_sweeps_are_read_exactly(text: str, values: list[float]) -> None:
    assert weights.swept([text]) == {"alpha": values}


@pytest.mark.parametrize(
    "text", ["alpha", "alpha=", "alpha=0:1", "alpha=0:1:0", "alpha=a,b", "alpha=0:1e9:1", "=1,2", "a=nan:1:1"]
)
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--sweep"):
        weights.swept([text])


def given(**said: object) -> dict[str, object]:
    return {"block_weights": (), "rules": (), "unet": None, "te": None, "vae": None, **said}


def test_parts_go_to_the_first_weight() -> None:
    found = weights.combined(find("add_difference"), 3, {}, given(unet=0.5, te=0.0, vae="1.0"))
    assert found == {"alpha": sdmerge.Weights(value=1.0, unet=0.5, te=0.0, vae=1.0)}


def test_a_file_for_the_vae_stays_a_file(tmp_path: Path) -> None:
    said = given(vae=str(tmp_path / "vae.safetensors"))
    assert weights.combined(find("add_difference"), 3, {"alpha": 1.0}, said) == {"alpha": 1.0}
    assert said["vae"] == str(tmp_path / "vae.safetensors")


def test_blocks_and_rules_by_name() -> None:
    said = given(block_weights=("density.B=IN01=0.5",), rules=("*.attn1.*:0.25",))
    found = weights.combined(find("ties"), 2, {"density": (0.2, 0.3)}, said | {"rules": ("lam=*.attn1.*:0.25",)})
    assert found["density"] == (0.2, sdmerge.Weights(value=0.3, blocks={"IN01": 0.5}))
    assert found["lam"] == sdmerge.Weights.from_yaml({"value": 1.0, "rules": ["*.attn1.*:0.25"]})


def test_a_number_for_each_model_needs_one_named() -> None:
    with pytest.raises(RequestError, match=r"weights\.B="):
        weights.combined(find("ties"), 2, {}, given(unet=0.5))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (("density",), "says no value"),
        (("desnity=1",), "did you mean 'density'"),
        (("normalize=maybe",), "normalize is 'maybe'"),
        (("density=a",), "density is 'a'"),
    ],
)
def test_parameters_that_cannot_be_read(parameters: tuple[str, ...], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        weights.parsed(find("ties"), parameters)


def test_parameters_have_their_types() -> None:
    found = weights.parsed(find("dare_ties"), ("density=0.5,0.25", "rescale=no", "seed=7", "vote=count", "lam=0.5"))
    assert found == {"density": (0.5, 0.25), "rescale": False, "seed": 7, "vote": "count", "lam": 0.5}
