"""Reading folders of pictures: what is understood, and everything that is wrong told at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from sdmerge.train import data

if TYPE_CHECKING:
    from pathlib import Path


def picture(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 120).save(path)
    return path


def problems(folder: Path, **options: object) -> list[str]:
    with pytest.raises(data.DataProblems) as found:
        data.find(folder, **options)  # type: ignore[arg-type]
    return [one.replace(f"{folder}/", "") for one in found.value.problems]


def test_captions_beside_pictures_and_names_of_folders(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (8, 6))
    (tmp_path / "a.txt").write_text("one\n two", encoding="utf-8")
    picture(tmp_path / "3_sks dog" / "b.jpg")
    picture(tmp_path / "3_sks dog" / "c.PNG")
    (tmp_path / "3_sks dog" / "c.caption").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    found = {item.path.name: item for item in data.find(tmp_path)}
    assert {name: (item.caption, item.repeats) for name, item in found.items()} == {
        "a.png": ("one two", 1),
        "b.jpg": ("sks dog", 3),
        "c.PNG": ("a café", 3),
    }
    assert found["a.png"].size == (8, 6)


def test_a_table_of_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/b.png", "text": "two", "more": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert [item.caption for item in data.find(tmp_path)] == ["one", "two"]


def test_everything_that_is_wrong_is_told_in_one_list(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (tmp_path / "broken.txt").write_text("a caption")
    whole = picture(tmp_path / "cut.png", (200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.txt").write_text("a caption")
    picture(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "alone.txt").write_text("no picture")
    picture(tmp_path / "silent.png")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a caption")
    found = problems(tmp_path)
    assert len(found) == 6
    text = "\n".join(found)
    for name, said in {
        "broken.png": "cannot be read as a picture",
        "cut.png": "cannot be read as a picture",
        "latin.txt": "is not UTF-8",
        "alone.txt": "without a picture",
        "silent.png": "has no caption",
        "wide.png": "wider than a byte",
    }.items():
        assert any(one.startswith(name) and said in one for one in found), (name, text)


def test_a_wrong_table_is_told_line_by_line(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = [
        '{"file_name": "a.png"}',
        "{",
        '{"file_name": "b.png", "text": "x"}',
        '{"file_name": "../a.png", "text": "x"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = problems(tmp_path)
    assert [one.partition(": ")[0] for one in found] == [f"metadata.jsonl, line {i}" for i in (1, 2, 3, 4)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problems(tmp_path)[0]


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert "holds no pictures" in problems(tmp_path)[0]
    assert "is no folder" in problems(tmp_path / "none")[0]
    (tmp_path / "metadata.jsonl").write_text("")
    assert "is empty" in problems(tmp_path)[0]


def test_one_caption_for_all_or_none_needed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert data.find(tmp_path, caption="all")[0].caption == "all"
    assert data.find(tmp_path, captions=False)[0].caption == ""


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert data.find(tmp_path, caption="")[0].size == (6, 8)


def test_pixels_cover_the_size_and_are_cut_from_the_middle(tmp_path: Path) -> None:
    values = np.zeros((10, 30, 4), np.uint8)
    values[..., 0], values[..., 3] = 255, 51
    values[:, :10, 3] = 255
    rgb, alpha, cut = data.pixels(Image.fromarray(values), (10, 10))
    assert rgb.shape == (3, 10, 10)
    assert cut == (0, 10)
    torch.testing.assert_close(rgb[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(alpha, torch.full((1, 10, 10), 0.2))
    _, alpha, cut = data.pixels(Image.fromarray(values), (10, 10), (0.0, 0.0))
    assert (cut, float(alpha.mean())) == ((0, 0), 1.0)
    rgb, alpha, _ = data.pixels(Image.new("RGB", (4, 4)), (8, 8))
    assert (rgb.shape, float(alpha.min())) == ((3, 8, 8), 1.0)
