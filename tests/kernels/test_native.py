"""Native code against the torch reference, bit for bit, on every pattern of bits; and what happens without it."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import build, linear, native

if TYPE_CHECKING:
    from pathlib import Path

    from sdkernels.native import Library

TYPES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
TYPE = st.sampled_from(list(TYPES))
WEIGHT = st.sampled_from([1.0, 0.5, -1.0, 0.7, 0.0, 1e-30, 3e38, 1 / 3])
SIZE = st.integers(0, 70)


@pytest.fixture(autouse=True)
def _with_library(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(native, "LIBRARY", library)


def patterns(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Random bits: NaN, infinities, subnormals and zeros of both signs among them; half of the time ordinary numbers."""
    source = torch.Generator().manual_seed(seed)
    if seed % 2:
        return torch.randn(count, generator=source).to(dtype)
    bits = 8 * dtype.itemsize
    special = torch.tensor([0, 1, -1, 1 << (bits - 2), -(1 << (bits - 1)), -(1 << (bits - 1)) + 1])
    drawn = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (count,), generator=source)
    chosen = special[torch.randint(0, len(special), (count,), generator=source)]
    return torch.where(torch.rand(count, generator=source) < 0.2, chosen, drawn).to(TYPES[dtype]).view(dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits; NaN may carry any."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    kind = TYPES[got.dtype]
    number = ~want.isnan()
    assert torch.equal(got[number].view(kind), want[number].view(kind))


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[Any], Tensor]:
    """Terms and where their sum goes: every mix of types, odd sizes, one to six terms."""
    count, alike = draw(SIZE), draw(st.booleans())
    first = draw(TYPE)
    seeds = iter(range(draw(st.integers(0, 1 << 20)), 1 << 30))

    def tensor() -> Tensor:
        return patterns(first if alike else draw(TYPE), count, next(seeds))

    terms = [
        (draw(WEIGHT), tensor(), *([tensor()] if draw(st.booleans()) else [])) for _ in range(draw(st.integers(1, 6)))
    ]
    return terms, torch.empty(count, dtype=first if alike else draw(TYPE))


@given(sums())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bits_are_those_of_the_reference(case: tuple[list[Any], Tensor]) -> None:
    terms, out = case
    before = [x.clone() for _, *xs in terms for x in xs]
    want = linear.reference(terms, torch.empty_like(out))
    assert native.combine_into(terms, out) == bool(out.isfinite().all())
    assert_same_bits(out, want)
    assert_same_bits(linear.combine(terms), linear.reference(terms))
    for x, was in zip([x for _, *xs in terms for x in xs], before, strict=True):
        assert torch.equal(x.view(TYPES[x.dtype]), was.view(TYPES[x.dtype]))


@given(TYPE, SIZE, st.integers(0, 1 << 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_finite(dtype: torch.dtype, count: int, seed: int) -> None:
    x = patterns(dtype, count, seed)
    assert native.finite(x) == bool(x.isfinite().all())


@pytest.mark.parametrize("dtype", TYPES)
def test_every_half_and_every_step_between_halves(dtype: torch.dtype) -> None:
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = (
        half.view(dtype)
        if dtype.itemsize == 2
        else (half.int() << 16 | (half.int() * 2654435761 >> 15) & 0xFFFF).view(dtype)
    )
    for to in TYPES:
        assert_same_bits(linear.native([(1.0, x)], torch.empty(x.shape, dtype=to)), x.float().to(to))


def test_largest_values_round_as_in_torch() -> None:
    for to, top in ((torch.float16, 65504.0), (torch.bfloat16, torch.finfo(torch.bfloat16).max)):
        edge = torch.tensor([top]) + torch.finfo(to).eps * top / 2 * torch.tensor([0.5, 0.999, 1.0, 1.001])
        x = torch.cat([edge, -edge])
        for value in x.split(1):
            out = torch.empty(1, dtype=to)
            assert native.combine_into([(1.0, value)], out) == bool(value.to(to).isfinite().all())
            assert_same_bits(out, value.to(to))


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 40), st.integers(0, 1 << 20))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_matrices_with_gaps_between_rows(rows: int, columns: int, gap: int, seed: int) -> None:
    x, y = (patterns(torch.float16, rows * (columns + gap), seed + i).view(rows, -1)[:, :columns] for i in range(2))
    whole = torch.full((rows, columns + gap), 7.0, dtype=torch.bfloat16)
    out = whole[:, :columns]
    delta = torch.randn(rows, columns)
    terms = [(1.0, x), (0.5, delta, y)]
    if native.combine_into(terms, out) is None:  # a column of a matrix is no row
        assert columns == 1
        return
    assert_same_bits(linear.combine(terms, out), linear.reference(terms, torch.empty(rows, columns, dtype=out.dtype)))
    assert (whole[:, columns:] == 7).all()


def test_what_it_is_not_for_goes_to_torch() -> None:
    x = torch.arange(6.0)
    for other in (x.double(), x.to(torch.float8_e5m2), x.long(), x[:1], x.view(2, 3), torch.arange(12.0)[::2]):
        assert native.combine_into([(1.0, x), (0.5, other)], torch.empty(6)) is None
    assert native.finite(x.double()) is None
    assert not native.serves(torch.float64)
    assert torch.equal(linear.combine([(0.5, x.double())]), x.double() / 2)
    transposed = torch.empty(3, 2).T
    assert torch.equal(linear.combine([(0.5, x.view(2, 3))], transposed), x.view(2, 3) / 2)


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", None)
    x = torch.arange(6.0)
    assert native.combine_into([(1.0, x)], torch.empty(6)) is None
    assert native.finite(x) is None
    assert not native.serves(torch.float32)
    assert torch.equal(linear.combine([(0.5, x)]), x / 2)


def test_a_sum_is_made_of_what_memory_holds_when_it_is_called() -> None:
    x, out = torch.ones(40), torch.empty(40)
    add_up = native.sums([([(2.0, x)], out)])
    assert add_up is not None
    for value, count in ((1.0, 40), (5.0, 40), (7.0, 33)):
        x.fill_(value)
        before = out.clone()
        assert add_up(count) == [True]
        assert torch.equal(out, torch.cat([2 * x[:count], before[count:]]))


@given(st.lists(TYPE, min_size=3, max_size=3), st.integers(1, 40), st.integers(1, 5), st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_sums_of_what_lies_in_files(types: list[torch.dtype], columns: int, rows: int, data: st.DataObject) -> None:
    """Two outputs of the same inputs: one in memory, two in a file behind each other, read a row at a time."""
    count = data.draw(st.integers((rows - 1) * columns + 1, rows * columns))
    seed = data.draw(st.integers(0, 1 << 20))
    whole = [patterns(dtype, rows * columns, seed + i) for i, dtype in enumerate(types)]
    held, *filed = whole
    memory = [torch.full((columns,), 3.0, dtype=x.dtype) for x in filed]
    values = [held.view(rows, columns), *(x.view(1, -1).expand(rows, columns) for x in memory)]
    outs = [torch.full((rows, columns), 7.0, dtype=data.draw(TYPE)) for _ in range(2)]
    terms = [lambda x: [(0.7, x[0]), (-0.3, x[1], x[2])], lambda x: [(1.0, x[2]), (0.5, x[1])]]
    add_up = native.sums([(term(values), out) for term, out in zip(terms, outs, strict=True)])
    assert add_up is not None
    with tempfile.TemporaryFile() as file:
        file.write(b"head")
        places = []
        for x, row in zip(filed, memory, strict=True):
            places.append(native.FilePart(file.fileno(), file.tell(), row))
            file.write(bytes(x.view(torch.uint8).numpy()))
        file.flush()
        found = add_up(count, places)
        short = add_up(count, [*places[:1], native.FilePart(file.fileno(), file.tell() - 1, memory[1])])
    assert short is None
    for out, term, good in zip(outs, terms, found or [], strict=True):
        want = linear.reference(term(whole), torch.empty(rows * columns, dtype=out.dtype))[:count]
        assert good == bool(want.isfinite().all())
        assert_same_bits(out.view(-1)[:count], want)
        assert (out.view(-1)[count:] == 7).all()


def test_no_compiler_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{tmp_path / 'nothing-here'}")
    monkeypatch.setattr(build, "_compiler", list)
    assert build.build(tmp_path) is None
    monkeypatch.setattr(build, "_compiler", lambda: ["false"])
    assert build.build(tmp_path) is None
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert build.build(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_library_is_named_for_its_source_and_replaces_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native-0123456789ab.so").touch()
    built = build.build(tmp_path)
    assert built == build.library(tmp_path)
    assert list(tmp_path.iterdir()) == [built]
    sources = tmp_path / "sources"
    shutil.copytree(build.FOLDER, sources, ignore=lambda _, names: [n for n in names if not n.endswith((".c", ".h"))])
    monkeypatch.setattr(build, "FOLDER", sources)
    assert build.library(tmp_path) == built
    for source in sources.iterdir():
        before = source.read_text()
        source.write_text(before + "\n")
        assert build.library(tmp_path) != built
        source.write_text(before)


def test_a_broken_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "native.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setattr(native, "library", lambda: broken)
    assert native._load() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native._load() is None
