"""Pictures and captions of a folder, looked at completely before the first step.

Understood are pictures beside texts of the same name (``a.png``, ``a.txt``), subfolders named ``10_some words`` (each of
its pictures counts ten times, and the words are the caption of those without one), and a ``metadata.jsonl`` whose lines
have ``file_name`` and ``text``.
"""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sdmerge.errors import SdmergeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEXTS = (".txt", ".caption")
METADATA = "metadata.jsonl"
_REPEATED = re.compile(r"(\d{1,4})_(.*)")
_LARGEST_TEXT = 1 << 16
_READERS = 4


class DataProblems(SdmergeError):
    """The data cannot be trained on. `problems` has a line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"the data has {len(self.problems)} problems: {'; '.join(self.problems)}")


@dataclass(frozen=True)
class Item:
    """A picture and what it shows.

    Attributes:
        size: width and height in pixels, upright.
        repeats: how often it is seen in one round.
    """

    path: Path
    caption: str
    size: tuple[int, int] = (0, 0)
    repeats: int = 1


def find(folder: Path, *, caption: str | None = None, captions: bool = True) -> tuple[Item, ...]:
    """Find the pictures of a folder, and open each of them once.

    Args:
        folder: where to look, subfolders included.
        caption: that of pictures which have none.
        captions: whether captions are needed; without them, those that are missing are empty.

    Raises:
        DataProblems: everything that is wrong, in one list.
    """
    problems: list[str] = []
    if not folder.is_dir():
        raise DataProblems([f"{folder}: is no folder"])
    usual = caption if captions else ""
    items = list((_listed if (folder / METADATA).is_file() else _paired)(folder, usual, problems))
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(_looked_at, items))
    problems += [one for one in found if isinstance(one, str)]
    good = tuple(one for one in found if isinstance(one, Item))
    if not items and not problems:
        problems.append(f"{folder}: holds no pictures (expected {', '.join(PICTURES)})")
    if problems:
        raise DataProblems(problems)
    return good


_NO_CAPTION = "has no caption: put a .txt of the same name beside it, or give one for all with --caption"


def _paired(folder: Path, caption: str | None, problems: list[str]) -> Iterator[Item]:
    """Yield pictures with the texts beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    stems = {path.with_suffix("") for path in pictures}
    for path in files:
        if path.suffix.lower() in TEXTS and path.with_suffix("") not in stems:
            problems.append(f"{path}: is a caption without a picture")
    for path in pictures:
        repeats, words = 1, ""
        if (match := _REPEATED.fullmatch(path.parent.name)) and path.parent != folder:
            repeats, words = int(match[1]), match[2].strip()
        text = _text_beside(path, problems)
        if text is None:
            text = words or caption
        if text is None:
            problems.append(f"{path}: {_NO_CAPTION}")
            continue
        yield Item(path, text, repeats=max(1, repeats))


def _text_beside(path: Path, problems: list[str]) -> str | None:
    """Return the caption of a picture; None where there is no text beside it."""
    for suffix in TEXTS:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            try:
                data = beside.read_bytes()
                if len(data) > _LARGEST_TEXT:
                    problems.append(f"{beside}: is {len(data):,} bytes long, which is no caption")
                    return ""
                return " ".join(data.decode("utf-8-sig").split())
            except UnicodeDecodeError:
                problems.append(f"{beside}: is not UTF-8: save it again in that encoding")
            except OSError as error:
                problems.append(f"{beside}: cannot be read: {error.strerror or error}")
            return ""
    return None


def _listed(folder: Path, caption: str | None, problems: list[str]) -> Iterator[Item]:
    """Yield what a metadata.jsonl lists."""
    table = folder / METADATA
    try:
        lines = table.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        problems.append(f"{table}: is not UTF-8: save it again in that encoding")
        return
    except OSError as error:
        problems.append(f"{table}: cannot be read: {error.strerror or error}")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        entry = _entry(line, caption)
        if entry is None:
            problems.append(f"{where}: is no JSON object with the texts file_name and text")
            continue
        name, text = entry
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{where}: {name!r} is outside the folder")
        elif not path.is_file():
            problems.append(f"{where}: {name!r} is not there")
        else:
            yield Item(path, " ".join(text.split()))
    if not lines:
        problems.append(f"{table}: is empty")


def _entry(line: str, caption: str | None) -> tuple[str, str] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    name, text = found.get("file_name"), found.get("text", caption)
    return (name, text) if isinstance(name, str) and isinstance(text, str) else None


def _looked_at(item: Item) -> Item | str:
    """Return an item with its size, or what is wrong with its picture."""
    try:
        return replace(item, size=opened(item.path).size)
    except UnreadablePicture as error:
        return f"{item.path}: {error}"


class UnreadablePicture(Exception):
    """A file that is no picture, or a broken one. The message says what is wrong, but not where."""


def opened(path: Path) -> Image:
    """Decode a picture completely, turned upright, as RGB or (where it has an alpha channel) RGBA.

    Raises:
        UnreadablePicture: it is broken, too large, or of a kind whose values cannot be told.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                if picture.mode.startswith(("I", "F")):
                    raise UnreadablePicture(f"has {picture.mode} values, wider than a byte: save it with 8 bits")
                alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
                return ImageOps.exif_transpose(picture.convert("RGBA" if alpha else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePicture(f"cannot be read as a picture: {str(error).partition(chr(10))[0]}") from error


def pixels(
    picture: Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Scale a picture until it covers a size, and cut that out of it.

    Args:
        picture: RGB or RGBA.
        size: width and height wanted.
        place: which part of what is too much is cut on the left and at the top.

    Returns:
        RGB [3, height, width] in -1..1; alpha [1, height, width] in 0..1 (ones where there is none); and how many pixels were
        cut at the top and on the left.
    """
    from PIL import Image

    width, height = size
    scale = max(width / picture.width, height / picture.height)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (int(share * (there - wanted)) for share, there, wanted in zip(place, scaled, size, strict=True))
    cut = picture.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(cut, dtype=np.uint8)).permute(2, 0, 1).float()
    alpha = values[3:] / 255 if len(values) == 4 else torch.ones(1, height, width)
    return values[:3] / 127.5 - 1, alpha, (top, left)


def captions_of(items: Sequence[Item]) -> Mapping[str, int]:
    """Return every caption, and how many pictures have it."""
    found: dict[str, int] = {}
    for item in items:
        found[item.caption] = found.get(item.caption, 0) + 1
    return found
