"""Plain captions that stand for everything a model knows and is to keep, where a user gives none."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

MOST = 200
"""Captions that count, as in Custom Diffusion's own merge."""
_LARGEST = 1 << 20
_SUBJECTS = (
    *("an old man with a grey beard", "two children on bicycles", "a woman reading a newspaper", "a brown horse"),
    *("a red sports car", "a sailing boat", "a wooden table with fruit", "a stone bridge", "a bowl of noodle soup"),
    *("a castle above a river", "a steam train", "a flock of white birds", "a glass vase with tulips", "a lighthouse"),
    *(
        "a crowd in front of a stage",
        "a small robot",
        "a black piano",
        "a mountain lake",
        "a street market",
        "a kitchen",
    ),
)
_SCENES = (
    "a photo of {} at sunset",
    "an oil painting of {} under heavy clouds",
    "{} in the snow, seen from far above",
    "a close-up of {}, shallow depth of field, soft morning light",
    "a pencil drawing of {} on yellow paper",
    "{} in a narrow street at night, neon signs, rain",
    "a poster with {} and large blue letters",
    "a professional photograph of {} before a plain white wall, studio lighting",
    "a fantasy illustration of {} inside an ancient forest, very detailed",
    "{} beside an empty road in the desert, wide angle, 1970s film",
)


def captions(path: Path | None) -> list[str]:
    """Return the captions of a file, one a line; 200 of ours without one.

    Raises:
        RequestError: the file cannot be read, or has no captions.
    """
    if path is None:
        return [scene.format(subject) for subject, scene in product(_SUBJECTS, _SCENES)]
    try:
        if path.stat().st_size > _LARGEST:
            raise RequestError(f"{path}: is too large for a list of captions (expected at most 1 MiB)")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as a list of captions ({error})") from error
    found = [line.strip() for line in lines if line.strip()][:MOST]
    if not found:
        raise RequestError(f"{path}: has no captions (expected one a line)")
    return found
