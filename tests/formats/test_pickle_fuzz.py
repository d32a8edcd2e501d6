"""Mutated files: each is refused cleanly, or gives what torch reads from it."""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdformats.crc import combine
from sdformats.errors import FormatError
from sdformats.pickle import open_pickle
from tests.formats import hostile_pickles as h
from tests.formats.pickle_oracle import flatten, raw

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.pickle import PickleSource


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, buffer, **options)
    return buffer.getvalue()


def values() -> dict[str, Any]:
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "a": base.half(),
        "b": base.t(),
        "c": {"d": torch.ones(2, dtype=torch.bfloat16)},
        "step": 7,
        "name": "x",
        "e": [1, None],
    }


def seeds() -> list[bytes]:
    kind = h.name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    callbacks = {kind: h.new(h.name("argparse", "Namespace"))}
    lightning = {"state_dict": {"w": h.tensor((2, 3), (1, 2))}, "epoch": 3, "callbacks": callbacks}
    made = {"a": values()["a"].numpy(), "n": np.arange(2000.0), "s": np.float32(1), "list": [np.arange(3)]}
    return [
        torch_bytes(values()),
        torch_bytes(values(), _use_new_zipfile_serialization=False),
        torch_bytes(values(), _use_new_zipfile_serialization=False, pickle_protocol=4),
        h.build_zip(h.torch_members(lightning, crc=0), zip64=True),
        h.build_zip(h.torch_members({"a": h.tensor()}, deflate=True)),
        pickle.dumps(made, protocol=2),
        pickle.dumps(made, protocol=5),
        pickle.dumps({"t": torch.ones(3)}, protocol=4),
    ]


SEEDS = seeds()
PICKLES = [
    h.program({"a": h.tensor(), "b": h.tensor((2, 2), (1, 3), 1), "o": {"k": [1, 2.5, None, "x", b"y", (True,)]}})
] + [
    pickle.dumps(v, protocol=p)
    for p in (2, 4)
    for v in ([1, {"a": (2.5, "x")}, 1 << 70, b"z"], {"f": frozenset([1]), "s": {2}})
]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 30, 200]))
        match draw(st.sampled_from(["flip", "set", "delete", "insert", "copy", "cut", "big"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[at] = draw(st.integers(0, 255))
            case "delete":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "copy":
                source = draw(st.integers(0, max(0, len(data) - 1)))
                data[at : at + length] = data[source : source + length]
            case "cut":
                del data[at:]
            case "big":
                data[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(data)


def read_all(source: PickleSource) -> dict[str, bytes]:
    found = {name: bytes(source.read(name)) for name in source.specs}
    source.verify()
    return found


def compare_with_torch(path: Path, found: dict[str, bytes]) -> None:
    """Where torch can read the file too, it reads the same. It may refuse in any way it likes, and knows no protocol 4."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    expected = flatten(tree)
    for name, data in found.items():
        assert data == raw(expected[name]), name


def check_attempt(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        with open_pickle(path) as source:
            found = read_all(source)
    except FormatError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    compare_with_torch(path, found)


FUZZ = settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def test_the_originals_are_read(tmp_path: Path) -> None:
    for data in SEEDS:
        path = tmp_path / "x.pt"
        path.write_bytes(data)
        with open_pickle(path) as source:
            found = read_all(source)
        assert found
        compare_with_torch(path, found)


@FUZZ
@given(data=mutated(SEEDS))
def test_mutated_files(tmp_path: Path, data: bytes) -> None:
    check_attempt(tmp_path / "x.pt", data)


@FUZZ
@given(data=mutated(PICKLES))
def test_mutated_pickles_in_a_sound_zip(tmp_path: Path, data: bytes) -> None:
    check_attempt(tmp_path / "x.pt", h.build_zip(h.torch_members(data)))


@FUZZ
@given(body=st.binary(max_size=60), protocol=st.sampled_from([2, 3, 4, 5]))
def test_random_pickles(tmp_path: Path, body: bytes, protocol: int) -> None:
    check_attempt(tmp_path / "x.pkl", bytes([0x80, protocol]) + body + b".")


OPCODES = [
    *(bytes([code]) for code in b"(012N\x88)t\x85\x86\x87]ae}sudlR\x81bQ\x94\x93\x90\x8f"),
    *(b"K\1", b"X\1\0\0\0k", b"C\2yy", b"q\0", b"h\0", b"q\1", b"h\1"),
    *(h.name("torch", attribute) for attribute in ("FloatStorage", "Tensor", "Size")),
    *(h.name("numpy.core.multiarray", attribute) for attribute in ("_reconstruct", "scalar")),
    h.name("collections", "OrderedDict"),
    h.name("argparse", "Namespace"),
    h.name("builtins", "set"),
    h.name("numpy", "dtype"),
    h.name("_codecs", "encode"),
    h.name(*h.V2),
    h.name("torch._tensor", "_rebuild_from_type_v2"),
    h.storage(),
    h.tensor(),
]


@FUZZ
@given(steps=st.lists(st.sampled_from(OPCODES), max_size=40))
def test_random_programs(tmp_path: Path, steps: list[bytes]) -> None:
    check_attempt(tmp_path / "x.pt", h.build_zip(h.torch_members(b"\x80\x02" + b"".join(steps) + b".")))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@FUZZ
@given(value=plain, protocol=st.sampled_from([2, 3, 4, 5]))
def test_any_plain_data_is_built_as_python_builds_it(tmp_path: Path, value: Any, protocol: int) -> None:
    from sdformats.opcodes import Machine
    from sdformats.pickle_stream import Budget, Stream
    from sdformats.place import Place
    from sdformats.rebuild import Rebuild
    from sdformats.records import MemoryRecord, Span

    data = pickle.dumps(value, protocol=protocol)
    place = Place(tmp_path)
    built = Machine(Stream(Span(MemoryRecord(data, 0), 0, len(data)), place), Rebuild(place, Budget()), Budget()).run()
    assert built == value


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_checksums_combine(data: bytes, cuts: list[int]) -> None:
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    total = 0
    for begin, end in pairwise(borders):
        total = combine(total, zlib.crc32(data[begin:end]), end - begin)
    assert total == zlib.crc32(data)


def test_checksums_of_long_runs_combine() -> None:
    zeros, rest = bytes(5_000_000), b"end"
    assert combine(zlib.crc32(zeros), zlib.crc32(rest), 3) == zlib.crc32(rest, zlib.crc32(zeros))
    assert combine(zlib.crc32(rest), zlib.crc32(zeros), len(zeros)) == zlib.crc32(zeros, zlib.crc32(rest))
