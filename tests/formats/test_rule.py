"""Rules: what is cut is joined again, and what does not fit is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdformats import rule as rules
from sdformats.errors import CorruptFile, FormatError
from sdformats.keymap import EXTRAS, Component, KeyMap
from sdformats.rule import NAKED, Rule, one
from tests.formats.adapters.memory import array, ref

if TYPE_CHECKING:
    from sdformats.views import Ref


def values(*shape: int) -> Ref:
    return ref(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_what_is_cut_is_joined_again(shares: list[int], unit: int, data: st.DataObject) -> None:
    flags = {name: data.draw(st.booleans()) for name in ("swapped", "transposed", "pixel")}
    rows = unit * sum(shares) * (2 if flags["swapped"] else 1)
    rule = Rule(tuple(map(str, range(len(shares)))), tuple(shares), **flags)
    dims = data.draw(st.sampled_from([(), (3,), (3, 1, 1), (3, 3, 3)]))
    shape = (rows, *dims)
    if flags["transposed"] and len(shape) == 2:
        shape = (3, rows)
    given = values(*shape)
    parts = rule.cut(given, ".weight")
    assert [part.shape[0] * sum(shares) for part in parts] == [rows * share for share in shares]
    if not (flags["pixel"] and len(shape) == 2):
        assert np.array_equal(array(rule.join(parts, ".weight")), array(given))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CorruptFile, match="has 7 rows, which are no parts of 1:1:1"):
        Rule(("q", "k", "v"), (1, 1, 1)).cut(values(7, 2), ".weight")
    with pytest.raises(CorruptFile, match="has 7 rows, which have no halves"):
        Rule(("n",), swapped=True).cut(values(7), ".weight")


def test_parts_that_do_not_fit_are_refused() -> None:
    rule = Rule(("q", "k"), (1, 1))
    with pytest.raises(CorruptFile, match=r"is F32 \[3, 2\].*expected F32 \[4, 2\]"):
        rule.join([values(4, 2), values(3, 2)], ".weight")


def test_factors_of_joined_weights_are_one_where_they_are_equal() -> None:
    rule = Rule(("q", "k"), (1, 1))
    half, same_half, other = (ref(np.array(factor, dtype=np.float32)) for factor in (0.5, 0.5, 0.25))
    assert array(rule.join([half, same_half], ".scale_weight")) == 0.5
    assert rule.cut(half, ".scale_weight") == [half, half]
    assert array(rule.join([half, other], ".scale_weight", [1, 2])).tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(CorruptFile, match="is a factor without its weight"):
        rule.join([half, other], ".scale_weight")


def test_blocks_are_counted_by_whole_numbers() -> None:
    names = ["a.1.x", "a.10.x", "a.2", "b.3.x", "a.99999999.x"]
    assert rules.count(names, r"a\.(\d+)\.") == 11
    assert rules.count(names, r"(?:b|c)\.(\d+)\.|z\.(\d+)") == 4
    with pytest.raises(FormatError, match="has 9000 blocks of one kind"):
        rules.blocks(["a.8999.x"], r"a\.(\d+)\.")


def test_names_end_as_their_rule_says() -> None:
    table: Any = lambda _names: {"a": one("b"), "c.d": Rule(("e.f",), ends=NAKED)}  # noqa: E731
    known = KeyMap((Component("part", ("old.", "older."), table),))
    given = {
        "old.a.weight": values(2),
        "older.a.scale_weight": values(1),
        "old.c.d": values(3),
        "old.c.d.weight": values(2),
    }
    made = known.to_folder(given)
    assert list(made.tensors) == ["part.b.weight", "part.b.scale_weight", "part.e.f.weight", f"{EXTRAS}.old.c.d.weight"]
    assert made.kept == ["old.c.d.weight"]
    back = known.to_single(made.tensors)
    assert list(back.tensors) == ["old.a.weight", "old.a.scale_weight", "old.c.d", "old.c.d.weight"]
