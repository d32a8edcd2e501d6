"""The picture of a difference."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdformats.errors import FormatError, OutputExists, WriteError
from sdformats.tensor import DType, Spec
from sdmerge import heatmap
from sdmerge.comparison import Difference, TensorDifference, diff
from sdmerge.errors import RequestError
from sdmerge.measure import Measures
from tests.sdmerge import toys

if TYPE_CHECKING:
    from collections.abc import Callable

SAME = (0xD8, 0xE6, 0xEE)
HALF = Spec((4,), DType.F16)


def tensor(name: str, distance: float, component: str = "unet", block: str = "IN01") -> TensorDifference:
    measures = Measures(4, 4 * (distance > 0), 4, 0, 1.0, 1.0, 1.0, distance**2)
    return TensorDifference(name, component, block, HALF, HALF, measures)


def difference(*tensors: TensorDifference, a: str = "a.safetensors", b: str = "b.safetensors") -> Difference:
    return Difference(Path(a), Path(b), "sd1", tensors, ("BASE", "IN00", "IN01", "M00", "VAE"), ())


def picture(found: Difference, folder: Path) -> Any:
    heatmap.save(found, folder / "heat.png", overwrite=True)
    with Image.open(folder / "heat.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(pixels: Any, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=2).sum())


def test_every_tensor_is_in_one_place(tmp_path: Path) -> None:
    found = diff(*(toys.saved(tmp_path, name, seed) for seed, name in enumerate("ab")))
    shown = {panel.title: panel for panel in heatmap.panels(found)}
    assert list(shown) == ["network", "text encoder", "VAE"]
    network = shown["network"]
    assert network.columns[:3] == ("IN00", "IN01", "IN02")
    assert network.columns[-1] == "OUT11"
    assert network.rows[:2] == ("attn1.q", "attn1.k")
    place = network.rows.index("attn2.k"), network.columns.index("IN01")
    (one,) = [one for one in found.tensors if one.name == toys.TO_K]
    assert one.measures is not None
    assert network.cells[place] == heatmap.Cell(one.measures.distance, otherwise=False)
    assert (place[0], network.columns.index("IN03")) not in network.cells


def test_a_place_sums_up_its_tensors() -> None:
    names = [f"input_blocks.1.1.transformer_blocks.{i}.attn1.to_q.weight" for i in range(2)]
    (panel,) = heatmap.panels(difference(tensor(names[0], 0.3), tensor(names[1], 0.4)))
    assert (panel.rows, panel.columns) == (("attn1.q",), ("IN01",))
    assert panel.cells[0, 0].distance == pytest.approx(0.5 / math.sqrt(2))


def test_differences_without_a_distance_are_marked() -> None:
    lone = TensorDifference("conv_in.weight", "unet", "IN00", HALF, None)
    bits = TensorDifference("out.2.weight", "unet", "M00", HALF, HALF, Measures(4, 1, 4, 0, 1.0, 1.0, 1.0, 0.0))
    nan = TensorDifference("mid.conv.weight", "unet", "M01", HALF, HALF, Measures(4, 4, 3, 1, 1.0, 1.0, 1.0, 0.5))
    (panel,) = heatmap.panels(difference(lone, bits, nan, tensor("op.weight", 0.0)))
    assert panel.columns == ("IN00", "IN01", "M00", "M01")
    assert [panel.cells[0, i].otherwise for i in range(4)] == [True, False, True, True]


def test_identical_is_one_colour_and_changes_are_others(tmp_path: Path) -> None:
    names = [f"input_blocks.1.1.transformer_blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    same = picture(difference(*(tensor(name, 0.0) for name in names)), tmp_path)
    one = picture(difference(tensor(names[0], 0.1), *(tensor(name, 0.0) for name in names[1:])), tmp_path)
    assert same.shape == one.shape
    gone = count(same, SAME) - count(one, SAME)
    legend = count(same, SAME) - 3 * gone  # its key is smaller than a cell
    assert 500 < legend < gone
    far = picture(difference(tensor(names[0], 0.1), tensor(names[1], 0.001), tensor(names[2], 0.0)), tmp_path)
    assert not (far == one).all()


def test_the_same_difference_gives_the_same_bytes(tmp_path: Path) -> None:
    found = difference(tensor("input_blocks.1.0.in_layers.2.weight", 0.1))
    for name in ("one.png", "two.png"):
        heatmap.save(found, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        difference,
        lambda: difference(tensor("x", 0.0)),
        lambda: difference(tensor("x", math.inf), tensor("y.weight", 1e-9), tensor("conv_in.weight", 5.0)),
        lambda: difference(tensor("x", 1e-300), tensor("conv_in.weight", 1e150)),
        lambda: difference(tensor("x", 0.5, "new", "a$b_{"), tensor("y", 0.1, "other", "\x1b[31m\n")),
        lambda: difference(tensor("x", 0.5), a="漢字 $x^2$ \u202e\x07.safetensors", b="b" * 250),
        lambda: difference(*(tensor(f"layers.{i}.x", 0.01 * i, "te2") for i in range(150))),
        lambda: difference(*(tensor(f"attn.q{i}", 0.1, "unet", f"block {i}") for i in range(120))),
    ],
)
def test_anything_can_be_drawn(tmp_path: Path, make: Callable[[], Difference]) -> None:
    pixels = picture(make(), tmp_path)
    assert pixels.shape[0] > 150
    assert 1200 < pixels.shape[1] < 5000


def test_names_and_places_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"\.png"):
        heatmap.check(tmp_path / "heat.jpg")
    with pytest.raises(WriteError, match="does not exist"):
        heatmap.check(tmp_path / "none" / "heat.png")
    (tmp_path / "heat.png").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="--overwrite"):
        heatmap.check(tmp_path / "heat.png")
    with pytest.raises(FormatError):
        heatmap.save(difference(), tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes() == b"mine"
    heatmap.check(tmp_path / "heat.png", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heat.png"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pip install 'sdmerge\[demo\]'") as refused:
        heatmap.check(tmp_path / "heat.png")
    assert "\n" not in str(refused.value)


def test_models_of_other_shapes_are_drawn(tmp_path: Path) -> None:
    a = toys.saved(tmp_path, "a", 0)
    wide = {**toys.toy(1), toys.CONV_IN: torch.zeros(8, 9, 3, 3, dtype=torch.float16)}
    found = diff(a, toys.save(tmp_path / "b.safetensors", wide))
    network = heatmap.panels(found)[0]
    assert network.cells[network.rows.index("conv"), 0].otherwise
    assert picture(found, tmp_path).size
