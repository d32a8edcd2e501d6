"""Modules that are one in some files and several in others are cut and joined without changing a number."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdformats.adapters import names
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.fused import cut, fuse, split, swapped
from sdformats.adapters.record import Magnitude, Record
from sdformats.adapters.records import IA3, OFT, Full, GLoRA, LoHa, LoKr, LoRA, Norm, Rows
from sdformats.errors import CorruptFile
from sdformats.rule import Rule
from tests.formats.adapters.memory import array, equal, ref, scaled

if TYPE_CHECKING:
    from sdformats.views import Ref

QKV = Rule(("q", "k", "v"), (1, 1, 1))
LINEAR1 = Rule(("q", "k", "v", "mlp"), (1, 1, 1, 4))
HALVES = Rule(("norm",), swapped=True)
Array = np.ndarray[Any, Any]


def some(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Ref:
    """Return small whole numbers, none of them zero: their products are exact."""
    values = np.random.default_rng([seed, *shape]).integers(1, 5, shape)
    return ref((values * np.where(values % 2, 1, -1)).astype(dtype))


def lora(out: int = 4, rank: int = 2, *, seed: int = 0, down: int | None = None, **more: Any) -> LoRA:
    return LoRA(up=some(out, rank, seed=seed), down=some(rank, 5, seed=100 + (seed if down is None else down)), **more)


def delta(record: Record) -> Array:
    """Return what a record adds, for algorithms that need no weight, straight from their formulas."""
    match record:
        case Rows():
            whole = delta(record.of)
            return np.concatenate([whole[start:stop] for start, stop in record.ranges])
        case LoRA():
            made = array(record.up) @ array(record.down)
        case LoHa():
            made = (array(record.w1_a) @ array(record.w1_b)) * (array(record.w2_a) @ array(record.w2_b))
        case LoKr():
            first = array(record.w1) if record.w1 is not None else array(record.w1_a) @ array(record.w1_b)
            second = array(record.w2) if record.w2 is not None else array(record.w2_a) @ array(record.w2_b)
            made = np.kron(first, second)
        case Full():
            made = array(record.weight)
        case _:
            raise AssertionError(record.algorithm)
    return np.asarray(made * record.scale)


def loha(**more: Any) -> LoHa:
    return LoHa(w1_a=some(12, 2), w1_b=some(2, 5), w2_a=some(12, 2, seed=1), w2_b=some(2, 5, seed=1), **more)


LOKRS = {
    "whole": LoKr(w1=some(6, 2), w2=some(2, 3)),
    "first as a product": LoKr(w1_a=some(6, 1), w1_b=some(1, 2), w2=some(2, 3), alpha=3),
    "second as a product": LoKr(w1=some(6, 2), w2_a=some(2, 2), w2_b=some(2, 3), alpha=1),
}
ACROSS = LoKr(w1=some(2, 2), w2=some(6, 3))


def rows_cut(record: Record) -> None:
    whole, parts = delta(record), split(record, QKV)
    assert list(parts) == ["q", "k", "v"]
    for index, part in enumerate(parts.values()):
        assert np.array_equal(delta(part), whole[4 * index : 4 * index + 4])
        assert part.height == 4


def whole_again(record: Record, fusion: Rule = QKV) -> Record:
    parts = split(record, fusion)
    return fuse("m", [parts.get(name) for name in fusion.parts], fusion, scaled)


@pytest.mark.parametrize(
    "record",
    [lora(12), lora(12, alpha=0.5), loha(alpha=3), Full(weight=some(12, 5)), ACROSS, *LOKRS.values()],
    ids=lambda record: record.algorithm,
)
def test_parts_are_rows_of_the_whole_and_make_it_again(record: Record) -> None:
    rows_cut(record)
    assert equal(whole_again(record), record)


def test_a_kronecker_product_is_cut_where_its_blocks_end() -> None:
    assert all(isinstance(part, LoKr) for record in LOKRS.values() for part in split(record, QKV).values())


def test_a_kronecker_product_across_the_borders_is_kept_whole() -> None:
    parts = split(ACROSS, QKV)
    assert all(isinstance(part, Rows) and part.of == ACROSS for part in parts.values())
    assert whole_again(ACROSS) == ACROSS


def test_a_part_of_what_cannot_be_cut_makes_no_whole() -> None:
    parts = split(ACROSS, QKV)
    with pytest.raises(CannotHold, match="lokr|rows"):
        fuse("m", [parts["q"], None, parts["v"]], QKV, scaled)
    with pytest.raises(CannotHold):
        fuse("m", [parts["k"], parts["q"], parts["v"]], QKV, scaled)


def test_linear1_is_cut_as_its_shares_are() -> None:
    record = lora(28)
    parts = split(record, LINEAR1)
    assert [part.height for part in parts.values()] == [4, 4, 4, 16]
    assert np.array_equal(np.concatenate([delta(part) for part in parts.values()]), delta(record))
    assert equal(whole_again(record, LINEAR1), record)


def test_parts_of_a_dense_lora_share_its_down_and_alpha() -> None:
    record = lora(12, alpha=0.5)
    for part in split(record, QKV).values():
        assert isinstance(part, LoRA)
        assert (part.down, part.alpha) == (record.down, 0.5)


def test_equal_downs_of_different_files_are_one_down() -> None:
    made = fuse("m", [lora(seed=n, down=7, alpha=1) for n in range(3)], QKV, scaled)
    assert isinstance(made, LoRA)
    assert (made.rank, made.alpha) == (2, 1)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (4, 1, 1)])
@pytest.mark.parametrize("there", [(0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)])
def test_loras_of_their_own_are_blocks_and_come_apart_again(ranks: tuple[int, ...], there: tuple[int, ...]) -> None:
    records = [lora(rank=ranks[n], seed=n, alpha=ranks[n] / 2) if n in there else None for n in range(3)]
    made = fuse("m", records, QKV, scaled)
    assert isinstance(made, LoRA)
    assert (made.rank, made.scale, made.height) == (sum(ranks[n] for n in there), 0.5, 12)
    expected = [np.zeros((4, 5)) if record is None else delta(record) for record in records]
    assert np.array_equal(delta(made), np.concatenate(expected))
    parts = split(made, QKV)
    assert list(parts) == ["qkv"[n] for n in there]
    assert all(equal(parts["qkv"[n]], records[n] or made) for n in there)


@pytest.mark.parametrize("alphas", [(None, 1, 4), (1, 2, 3), (8, None, None)])
def test_scales_that_differ_are_folded(alphas: tuple[float | None, ...]) -> None:
    records = [lora(seed=n, alpha=alphas[n]) for n in range(3)]
    made = fuse("m", records, QKV, scaled)
    assert made.alpha is None
    assert np.array_equal(delta(made), np.concatenate([delta(record) for record in records]))


def test_a_part_of_zeros_is_no_part_of_the_adapter() -> None:
    up = np.zeros((12, 2), np.float32)
    up[4:8] = 1
    parts = split(LoRA(up=ref(up), down=some(2, 5)), QKV)
    assert list(parts) == ["k"]
    up[:4] = -0.0
    assert list(split(LoRA(up=ref(up), down=some(2, 5)), QKV)) == ["k"]


def test_an_adapter_that_was_never_trained_keeps_all_its_parts() -> None:
    parts = split(LoRA(up=ref(np.zeros((12, 2), np.float32)), down=some(2, 5)), QKV)
    assert list(parts) == ["q", "k", "v"]


def test_ranks_that_parts_share_are_not_taken_apart() -> None:
    up = array(some(12, 3)).copy()
    up[:4, 2] = up[4:8, 0] = 0
    record = LoRA(up=ref(up), down=some(3, 5))
    assert all(part.rank == 3 for part in split(record, QKV).values())
    rows_cut(record)


def test_blocks_that_are_not_in_order_are_not_taken_apart() -> None:
    up = np.zeros((12, 3), np.float32)
    up[:4, 2] = up[4:8, 0] = up[8:, 1] = 1
    record = LoRA(up=ref(up), down=some(3, 5))
    assert all(part.rank == 3 for part in split(record, QKV).values())
    rows_cut(record)


def test_tucker_s_form_is_cut_but_not_joined_from_different_parts() -> None:
    record = LoRA(up=some(12, 2, 1, 1), down=some(2, 5, 1, 1), mid=some(2, 2, 3, 3))
    parts = list(split(record, QKV).values())
    assert [part.height for part in parts] == [4, 4, 4]
    with pytest.raises(CannotHold, match="Tucker"):
        fuse("m", parts, QKV, scaled)


@pytest.mark.parametrize("shape", [(12, 1), (12,)])
def test_ia3_over_rows_is_cut_and_over_columns_it_is_the_same_for_all(shape: tuple[int, ...]) -> None:
    over_rows, over_columns = IA3(weight=some(*shape), on_input=False), IA3(weight=some(1, 5), on_input=True)
    parts = split(over_rows, QKV)
    for index, part in enumerate(parts.values()):
        assert isinstance(part, IA3)
        assert np.array_equal(array(part.weight), array(over_rows.weight)[4 * index : 4 * index + 4])
    assert equal(whole_again(over_rows), over_rows)
    assert split(over_columns, QKV) == dict.fromkeys("qkv", over_columns)
    assert whole_again(over_columns) == over_columns
    assert swapped(over_columns) == over_columns


@pytest.mark.parametrize("old", [False, True])
def test_glora_is_cut_where_it_adds(old: bool) -> None:
    a, b = (some(5, 2), some(2, 5)), (some(12, 2), some(2, 5, seed=1))
    factors = (*a, *b) if not old else (a[1], a[0], b[1], b[0])
    record = GLoRA(**dict(zip(("a1", "a2", "b1", "b2"), factors, strict=True)), old=old, alpha=1)
    parts = split(record, QKV)
    for index, part in enumerate(parts.values()):
        assert isinstance(part, GLoRA)
        assert part.height == 4
        assert np.array_equal(array(part.b2 if old else part.b1), array(b[0])[4 * index : 4 * index + 4])
    assert equal(whole_again(record), record)


def test_rotations_of_a_fused_module_are_kept_whole() -> None:
    for blocks in (some(3, 4, 4), some(2, 3, 4, 4)):
        record = OFT(blocks=blocks, constraint=0.5)
        parts = split(record, QKV)
        assert [part.height for part in parts.values()] == [4, 4, 4]
        assert whole_again(record) == record


def test_dora_over_rows_is_cut_with_its_lengths() -> None:
    record = lora(12, magnitude=Magnitude(some(12, 1), "out"), bias=some(12))
    parts = split(record, QKV)
    for index, part in enumerate(parts.values()):
        assert isinstance(part, LoRA)
        assert part.magnitude is not None
        assert np.array_equal(array(part.magnitude.values), array(some(12, 1))[4 * index : 4 * index + 4])
        assert np.array_equal(array(part.bias), array(some(12))[4 * index : 4 * index + 4])
    assert equal(whole_again(record), record)


def test_dora_over_columns_is_kept_whole() -> None:
    record = lora(12, magnitude=Magnitude(some(1, 5), "in"))
    assert all(isinstance(part, Rows) for part in split(record, QKV).values())
    assert whole_again(record) == record


@pytest.mark.parametrize("side", [{"magnitude": Magnitude(some(4, 1), "out")}, {"bias": some(4)}])
def test_lengths_or_a_bias_of_some_parts_cannot_be_held(side: dict[str, Any]) -> None:
    with_side = lora(**side)
    with pytest.raises(CannotHold, match="'m'"):
        fuse("m", [with_side, lora(seed=1), lora(seed=2)], QKV, scaled)
    with pytest.raises(CannotHold, match="'m'"):
        fuse("m", [with_side, None, None], QKV, scaled)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lora(), Full(weight=some(4, 5))),
        (Full(weight=some(4, 5)), Full(weight=some(4, 5), replaces=True)),
        (Full(weight=some(4, 5)), Full(bias=some(4))),
        (Full(weight=some(4, 5)), Full(weight=some(4, 5, dtype=np.float16))),
        (lora(), LoRA(up=some(4, 2, dtype=np.float16), down=some(2, 5))),
        (lora(), LoRA(up=some(4, 2), down=some(2, 5, dtype=np.float16))),
        (lora(), LoRA(up=some(4, 2), down=some(2, 6))),
        (lora(), lora(6)),
        (lora(), LoRA(up=some(4, 2, 1, 1), down=some(2, 5, 1, 1))),
        (split(loha(), QKV)["q"], split(loha(alpha=1), QKV)["k"]),
        (split(loha(), QKV)["q"], LoHa(w1_a=some(4, 2), w1_b=some(2, 5, seed=9), w2_a=some(4, 2), w2_b=some(2, 5))),
        (split(LOKRS["whole"], QKV)["q"], split(LOKRS["first as a product"], QKV)["k"]),
        (IA3(weight=some(4), on_input=False), IA3(weight=some(5), on_input=True)),
        (Norm(weight=some(4)), Norm(weight=some(4))),
    ],
)
def test_parts_that_do_not_go_together_are_an_error_that_names_the_module(one: Record, other: Record) -> None:
    for records in ([one, other, other], [other, one, one]):
        with pytest.raises(CannotHold, match="'m'"):
            fuse("m", records, QKV, scaled)


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(CorruptFile, match="13 rows"):
        split(lora(13), QKV)
    with pytest.raises(CorruptFile, match="halves"):
        split(lora(13), HALVES)


@pytest.mark.parametrize(
    "record",
    [
        lora(12, alpha=1),
        loha(),
        LOKRS["whole"],
        LoKr(w1=some(3, 2), w2=some(4, 3)),
        Full(weight=some(12, 5), bias=some(12)),
        lora(12, magnitude=Magnitude(some(12, 1), "out")),
        lora(12, magnitude=Magnitude(some(1, 5), "in")),
    ],
    ids=lambda record: record.algorithm,
)
def test_halves_that_change_places_twice_are_where_they_were(record: Record) -> None:
    whole, once = delta(record), swapped(record)
    assert np.array_equal(delta(once), np.concatenate([whole[6:], whole[:6]]))
    assert equal(swapped(once), record)
    assert equal(fuse("m", [split(record, HALVES)["norm"]], HALVES, scaled), record)


def test_cutting_twice_is_cutting_once() -> None:
    for record in (lora(12), ACROSS):
        whole = delta(record)
        part = cut(cut(record, ((2, 6), (8, 12))), ((2, 6),))
        assert np.array_equal(delta(part), np.concatenate([whole[4:6], whole[8:10]]))
        assert cut(record, ((0, 12),)) == record


@pytest.mark.parametrize(("rows", "changes"), [(2, True), (6, False)])
def test_sd3_s_last_context_norm_has_its_halves_swapped_and_no_other(rows: int, *, changes: bool) -> None:
    fusion = names.sd3()["joint_blocks.23.context_block.adaLN_modulation.1"]
    by_columns = LoRA(up=some(8 * rows, 2), down=some(2, 8))
    by_width = Full(bias=some(1536 * rows))
    for record in (by_columns, by_width):
        (part,) = split(record, fusion).values()
        assert equal(part, swapped(record) if changes else record)
        assert equal(fuse("m", [part], fusion, scaled), record)


def test_records_are_not_changed() -> None:
    record = lora(12, magnitude=Magnitude(some(12, 1), "out"))
    before = replace(record)
    whole_again(record)
    assert record == before
