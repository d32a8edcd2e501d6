"""Anything at all as the JSON in a picture: it is read, or refused with one clean error."""

from __future__ import annotations

import contextlib
import json
import random
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdformats.embeddings.describe import describe
from sdformats.errors import FormatError
from sdformats.files import open_source
from tests.formats.png.pictures import as_json, base64_of, with_text

if TYPE_CHECKING:
    from pathlib import Path

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["TORCHTENSOR", "*", "string_to_param", "clip_l", "<a>", "name"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)


def sizes(path: Path, data: bytes) -> list[tuple[int, int]]:
    """Return how many bytes each tensor gives, and how many it says that it has; none where the file is refused."""
    path.write_bytes(data)
    with contextlib.suppress(FormatError), open_source(path) as source:
        json.dumps(describe(source))
        return [(len(source.read(name)), spec.nbytes) for name, spec in source.specs.items()]
    return []


@SAME_FOLDER
@given(st.dictionaries(st.sampled_from(["string_to_param", "clip_l", "clip_g", "<a>", "name", "step"]), ANYTHING))
def test_any_tree(tmp_path: Path, tree: object) -> None:
    assert all(got == said for got, said in sizes(tmp_path / "e.png", with_text(base64_of(tree))))


@SAME_FOLDER
@given(st.integers(0, 2**32 - 1))
def test_damaged_json(tmp_path: Path, seed: int) -> None:
    """With a checksum that is right, as whoever means harm would make it."""
    source = random.Random(seed)
    data = bytearray(as_json(np.ones((2, 3), np.float32), name="a"))
    for _ in range(source.randint(1, 4)):
        data[source.randrange(len(data))] = source.choice(b'[]{},:"0e-\x00\xff9')
    assert all(got == said for got, said in sizes(tmp_path / "e.png", with_text(base64_of(bytes(data)))))


@SAME_FOLDER
@given(st.integers(0, 2**32 - 1))
def test_damaged_files(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    data = bytearray(with_text(base64_of(as_json(np.ones((2, 3), np.float32)))))
    for _ in range(source.randint(1, 3)):
        data[source.randrange(8, len(data))] = source.randrange(256)
    assert all(got == said for got, said in sizes(tmp_path / "e.png", bytes(data)))
