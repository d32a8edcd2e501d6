"""Rules for single tensors: what they say, whom they reach, and that they survive being written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdmerge.block_tables import table
from sdmerge.errors import RequestError
from sdmerge.rules import Rule, parse_rules

SD1 = table("sd1")
ATTN1 = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
ATTN2 = ATTN1.replace("attn1", "attn2")
OUT_ATTN2 = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
VAE = "first_stage_model.decoder.mid.attn_1.q.weight"
EVERY = {"in1": ATTN1, "in2": ATTN2, "out2": OUT_ATTN2, "te": TEXT, "vae": VAE}


def reached(text: str) -> str:
    rule = Rule.parse(text)
    return " ".join(short for short, name in EVERY.items() if rule.matches(name, SD1.block_of(name), SD1))


@pytest.mark.parametrize(
    ("text", "whom"),
    [
        ("IN04:attn2:0.5", "in2"),
        ("IN00-IN05:attn2:0.3", "in2"),
        ("in0-in5:attn:0.3", "in1 in2"),
        ("IN05 OUT05:attn2:0.3", "out2"),
        ("IN04 OUT05:attn2 attn1.to_q:0.3", "in1 in2 out2"),
        ("IN04::0.3", "in1 in2"),
        (":attn2:0.3", "in2 out2"),
        (":attn:0.3", "in1 in2 out2 te"),
        ("::0.3", "in1 in2 out2 te"),
        ("BASE::0.3", "te"),
        ("VAE::0.3", "vae"),
        ("VAE IN04:attn:0.3", "in1 in2 vae"),
        ("NOT IN04:attn:0.3", "out2 te"),
        ("NOT BASE IN00-IN11::0.3", "out2"),
        ("IN04:NOT attn1:0.3", "in2"),
        ("NOT OUT05:NOT attn1 self_attn:0.3", "in2"),
        ("*.attn1.*:0.2", "in1"),
        ("*:0.2", "in1 in2 out2 te vae"),
        ("first_stage_model.*:0.2", "vae"),
        ("*.input_blocks.[45].*attn?.*:0.2", "in1 in2"),
        ("attn1:0.2", ""),
    ],
)
def test_whom_a_rule_reaches(text: str, whom: str) -> None:
    assert reached(text) == whom


def test_all_blocks_include_what_is_in_none() -> None:
    flux = table("flux")
    assert Rule.parse("::0.5").matches("safety_checker.x", flux.block_of("safety_checker.x"), flux)


def test_blocks_are_not_found_inside_names() -> None:
    """IN01 is the block, never the beginning of another one's name, nor text in a tensor's name."""
    name = "model.diffusion_model.input_blocks.10.0.in_layers.2.weight"
    assert not Rule.parse("IN01::1").matches(name, SD1.block_of(name), SD1)
    assert Rule.parse("IN10::1").matches(name, SD1.block_of(name), SD1)


def test_commas_and_lines_separate_rules() -> None:
    rules = parse_rules("OUT06:attn:0.5,OUT06:attn2.to_k:0.2\n*.attn1.*:-1, \n")
    assert [str(rule) for rule in rules] == ["OUT06:attn:0.5", "OUT06:attn2.to_k:0.2", "*.attn1.*:-1.0"]
    assert parse_rules(["OUT06:attn:0.5, OUT06:attn2.to_k:0.2", rules[2]]) == rules
    assert parse_rules("") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("IN04", "rule 'IN04' cannot be read"),
        ("IN04:attn:0.5:1", "cannot be read"),
        (":0.5", "cannot be read"),
        ("IN04:attn:", "'' is no finite number"),
        ("IN04:attn:R", "'R' is no finite number"),
        ("*:nan", "'nan' is no finite number"),
        ("*:1e999", "'1e999' is no finite number"),
        ("NOT:attn:1", "says NOT and nothing behind it"),
        ("IN04:NOT:1", "says NOT and nothing behind it"),
    ],
)
def test_what_is_no_rule(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        Rule.parse(text)
    assert said in str(caught.value)
    assert "expected BLOCKS:ELEMENTS:RATIO" in str(caught.value)


@pytest.mark.parametrize("text", [5, None, ["IN04::1"]])
def test_a_rule_is_a_text(text: object) -> None:
    with pytest.raises(RequestError, match="is no text"):
        parse_rules([text])
    with pytest.raises(RequestError, match="is no text"):
        Rule.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["IN12:attn:0.5", "NOT INN01::0.5", "IN00-OUT12::1"])
def test_unknown_blocks_are_told_with_the_rule(text: str) -> None:
    rule = Rule.parse(text)
    with pytest.raises(RequestError, match=r"^rule '.*': '\w+'.* is no block of sd1 .*did you mean"):
        rule.check(SD1)


WORD = st.text("abcdn_.0129", min_size=1, max_size=6)
BLOCK = st.sampled_from(["IN00", "IN01-IN05", "M00", "BASE", "VAE", "OUT11-OUT03"])


@given(
    st.lists(BLOCK, max_size=3),
    st.lists(WORD, max_size=3),
    st.booleans(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_rule_is_written_as_it_is_read(
    blocks: list[str], elements: list[str], not_blocks: bool, not_elements: bool, ratio: float
) -> None:
    rule = Rule(
        ratio, None, tuple(blocks), tuple(elements), not_blocks and bool(blocks), not_elements and bool(elements)
    )
    assert Rule.parse(str(rule)) == rule
    assert hash(Rule.parse(str(rule))) == hash(rule)


@given(WORD.map("*{}?".format), st.floats(allow_nan=False, allow_infinity=False))
def test_a_pattern_is_written_as_it_is_read(pattern: str, ratio: float) -> None:
    assert Rule.parse(str(Rule(ratio, pattern))) == Rule(ratio, pattern)


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_refused_in_one_line(text: str) -> None:
    try:
        rules = parse_rules(text)
        for rule in rules:
            rule.check(SD1)
            rule.matches(ATTN1, "IN04", SD1)
    except RequestError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right
    else:
        assert parse_rules(",".join(map(str, rules))) == rules
