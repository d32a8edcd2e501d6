"""Embeddings in pictures: read as text and from pixels, against PIL and the rule written out."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdformats.files import open_source
from sdformats.place import Place
from sdformats.png.chunks import Chunks
from sdformats.png.pixels import read_pixels
from sdformats.png.strips import read_strips
from sdformats.positional import InputFile
from tests.formats.png.pictures import as_json, base64_of, saved, with_strips, with_text

if TYPE_CHECKING:
    from collections.abc import Sequence

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "real" / "083_a1111-test_embedding.png"
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def vectors(count: int = 3, width: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def put(folder: Path, data: bytes) -> Path:
    path = folder / "e.png"
    path.write_bytes(data)
    return path


def read(path: Path, name: str = "string_to_param.*") -> np.ndarray[Any, Any]:
    with open_source(path) as source:
        return np.frombuffer(source.read(name), np.float32).reshape(source.specs[name].shape)


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    place, file = Place(path), InputFile(path)
    try:
        return read_pixels(Chunks(file, place), place)
    finally:
        file.close()


def picture(height: int = 24, width: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(16, 255, (height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iTXt plain"])
def test_texts_of_every_kind(tmp_path: Path, kind: bytes) -> None:
    expected = vectors()
    path = put(tmp_path, with_text(base64_of(as_json(expected, name="a", step=7, sd_checkpoint=None)), kind))
    with open_source(path) as source:
        assert source.container == "png-text"
        assert dict(source.metadata) == {
            "string_to_token": '{"*": 265}', "name": "a", "step": "7", "sd_checkpoint": "null",
        }  # fmt: skip
    assert read(path).tobytes() == expected.tobytes()


def test_pictures_hold_what_their_pt_holds(tmp_path: Path) -> None:
    """Bit by bit, with subnormal numbers, negative zero and infinity, under the same names and texts."""
    values = torch.randn(5, 768)
    values[0, :5] = torch.tensor([0.0, -0.0, 1e-45, -3.4028235e38, float("inf")])
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": "x", "step": None}
    torch.save(tree, tmp_path / "e.pt")
    drawn = with_strips(picture(64), zlib.compress(as_json(values.numpy(), name="x", step=None)))
    for data in (with_text(base64_of(as_json(values.numpy(), name="x", step=None))), saved(drawn)):
        with open_source(put(tmp_path, data)) as one, open_source(tmp_path / "e.pt") as other:
            assert (one.specs, one.metadata, one.notes) == (other.specs, other.metadata, other.notes)
            assert all(one.read(name) == other.read(name) for name in one.specs)


@pytest.mark.parametrize("alpha", [False, True])
def test_pixels(tmp_path: Path, alpha: bool) -> None:
    expected = vectors(4, 40)
    drawn = with_strips(picture(), zlib.compress(as_json(expected)))
    if alpha:
        drawn = np.concatenate([drawn, np.full((*drawn.shape[:2], 1), 9, np.uint8)], axis=2)
    path = put(tmp_path, saved(drawn))
    with open_source(path) as source:
        assert source.container == "png-pixels"
    assert read(path).tobytes() == expected.tobytes()


def test_black_borders_and_black_columns_inside_the_picture(tmp_path: Path) -> None:
    expected = vectors()
    middle = picture()
    middle[:, 5:7] = 0
    drawn = with_strips(middle, zlib.compress(as_json(expected)))
    framed = np.pad(drawn, ((3, 2), (4, 1), (0, 0)))
    assert read(put(tmp_path, saved(framed))).tobytes() == expected.tobytes()


def test_text_goes_before_pixels(tmp_path: Path) -> None:
    drawn = with_strips(picture(), zlib.compress(as_json(vectors(2))))
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat")
    info.add_text("sd-ti-embedding", base64_of(as_json(vectors(5))).decode())
    assert read(put(tmp_path, saved(drawn, pnginfo=info))).shape == (5, 8)


@SAME_FOLDER
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_pixels_are_decoded_as_pil_does(
    tmp_path: Path, height: int, width: int, channels: int, smooth: int, seed: int
) -> None:
    """Smooth pictures make PIL use every filter."""
    random = np.random.default_rng(seed)
    steps = random.integers(-(4**smooth), 4**smooth + 1, (height, width, channels))
    pixels = (np.cumsum(np.cumsum(steps, 0), 1) if smooth else random.integers(0, 256, steps.shape)).astype(np.uint8)
    path = put(tmp_path, saved(pixels))
    assert np.array_equal(pixels_of(path), pixels[:, :, :3])


@pytest.mark.parametrize("kind", range(5))
def test_each_filter(tmp_path: Path, kind: int) -> None:
    """Rows with a filter of our choice; PIL is the judge."""
    from tests.formats.png.pictures import SIGNATURE, chunk

    rows = np.random.default_rng(kind).integers(0, 256, (9, 1 + 3 * 7), np.uint8)
    rows[:, 0] = kind
    header = b"\0\0\0\7\0\0\0\x09\x08\2\0\0\0"
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    path = put(tmp_path, SIGNATURE + body)
    with Image.open(path) as judge:
        assert np.array_equal(pixels_of(path), np.asarray(judge))


@pytest.mark.skipif(not REAL.is_file(), reason="the real files are not here")
def test_a_real_picture_says_the_same_both_ways() -> None:
    pixels = pixels_of(REAL)
    with Image.open(REAL) as judge:
        assert np.array_equal(pixels, np.asarray(judge))
    strips = read_strips(pixels, Place(REAL))
    assert strips is not None
    inside = np.array(json.loads(strips)["string_to_param"]["*"]["TORCHTENSOR"])
    assert read(REAL).tobytes() == inside.astype(np.float32).tobytes()
    assert inside.shape == (8, 768)


def test_other_shapes_and_names(tmp_path: Path) -> None:
    cases: Sequence[tuple[Any, str, tuple[int, ...]]] = (
        ({"clip_l": {"TORCHTENSOR": [[1, 2]]}}, "clip_l", (1, 2)),
        ({"a b": {"TORCHTENSOR": [1.5, 2]}}, "a b", (2,)),
        ({"x": {"TORCHTENSOR": 3}}, "x", ()),
        ({"x": {"TORCHTENSOR": []}}, "x", (0,)),
        ({"x": {"TORCHTENSOR": [[]]}}, "x", (1, 0)),
    )
    for tree, name, shape in cases:
        assert read(put(tmp_path, with_text(base64_of(tree))), name).shape == shape
