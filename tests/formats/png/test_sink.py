"""Pictures that are written: PIL reads their text and pixels, the rule written out their strips."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from sdformats.errors import OutputExists, WriteError
from sdformats.files import open_source
from sdformats.png import PngSink
from sdformats.tensor import DType, Spec
from sdformats.torch_pickle import TensorNamed
from tests.formats.png.pictures import strips_of

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, values: np.ndarray[Any, Any], dtype: DType = DType.F32, height: int = 64, **options: Any) -> Path:
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": TensorNamed("v")}, "name": "a\u00e9", "step": 3}
    picture = np.full((height, 50, 3), 77, np.uint8)
    with PngSink(path, {"v": Spec(values.shape, dtype)}, tree, picture=picture, **options) as sink:
        sink.write("v", 0, memoryview(values.tobytes()))
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.integers(1, 5).flatmap(lambda n: arrays(np.float32, (n, 24), elements=st.floats(width=32, allow_nan=False))))
def test_what_is_written(tmp_path: Path, values: np.ndarray[Any, Any]) -> None:
    path = write(tmp_path / "e.png", values, overwrite=True)
    with Image.open(path) as picture:
        text = base64.b64decode(picture.text["sd-ti-embedding"])  # type: ignore[attr-defined]
        assert strips_of(np.asarray(picture)) == text
        assert picture.mode == "RGB"
    tree = json.loads(text)
    assert {key: value for key, value in tree.items() if key != "string_to_param"} == {
        "string_to_token": {"*": 265}, "name": "a\u00e9", "step": 3,
    }  # fmt: skip
    inside = np.array(tree["string_to_param"]["*"]["TORCHTENSOR"]).astype(np.float32)
    assert inside.tobytes() == values.tobytes()
    with open_source(path) as source:
        assert bytes(source.read("string_to_param.*")) == values.tobytes()
        assert source.metadata["name"] == "a\u00e9"


def test_the_picture_is_between_the_strips(tmp_path: Path) -> None:
    with Image.open(write(tmp_path / "e.png", np.ones((1, 8), np.float32))) as picture:
        assert (np.asarray(picture)[10] == 77).all(axis=1).sum() == 50


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_narrower_numbers_are_written_exactly(tmp_path: Path, dtype: DType) -> None:
    values = np.arange(0x3C00, 0x3C40, dtype=np.uint16).reshape(2, 32)
    wide = values.view(np.float16).astype(np.float32) if dtype is DType.F16 else (values.astype("u4") << 16).view("f4")
    with open_source(write(tmp_path / "e.png", values, dtype)) as source:
        assert bytes(source.read("string_to_param.*")) == wide.tobytes()


def test_what_no_picture_holds(tmp_path: Path) -> None:
    path = tmp_path / "e.png"
    with pytest.raises(WriteError, match="F64"):
        write(path, np.ones((1, 8)), DType.F64)
    with pytest.raises(WriteError, match="too large for a picture"):
        write(path, np.ones((1000, 1000), np.float32))
    with pytest.raises(WriteError, match="so low a picture"):
        write(path, np.random.default_rng(0).standard_normal((8, 768)).astype(np.float32), height=1)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "e.png", np.ones((1, 8), np.float32))
    before = path.read_bytes()
    with pytest.raises(OutputExists):
        write(path, np.zeros((1, 8), np.float32))
    assert path.read_bytes() == before
