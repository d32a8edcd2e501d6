"""Block weights: every way to write them, which of them counts for a tensor, and the command that shows the table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sdmerge.blocks import Rule, Weights, parse_blocks, table
from sdmerge.cli.blocks import blocks, spark
from sdmerge.errors import RequestError, SdmergeError
from sdmerge.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable

NET = "model.diffusion_model."
IN01 = NET + "input_blocks.1.0.in_layers.2.weight"
IN04 = NET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
OUT = NET + "out.2.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
SD1, SDXL, FLUX = table("sd1"), table("sdxl"), table("flux")
RAMP = [i / 100 for i in range(26)]


def csv(values: list[float]) -> str:
    return ", ".join(map(str, values))


@pytest.mark.parametrize("write", [csv, list, tuple], ids=["text", "list", "tuple"])
def test_lists_with_and_without_base(write: Callable[[list[float]], Any]) -> None:
    names = SD1.blocks
    assert parse_blocks(write(RAMP), "sd1") == dict(zip(names, RAMP, strict=True))
    assert parse_blocks(write(RAMP[1:]), "sd2") == dict(zip(names[1:], RAMP[1:], strict=True))
    assert parse_blocks(write(RAMP[:20]), "sdxl") == dict(zip(SDXL.blocks, RAMP[:20], strict=True))
    assert parse_blocks(write(RAMP[:19]), "sdxl") == dict(zip(SDXL.blocks[1:], RAMP[:19], strict=True))
    assert parse_blocks(write([0.5] * 61), "flux") == dict.fromkeys(FLUX.blocks, 0.5)
    assert list(parse_blocks(write(RAMP[:25]), "sd3")) == ["BASE", *(f"JOINT{i:02}" for i in range(24))]
    assert len(parse_blocks(write([0.5] * 38), "sd3")) == 38


def test_lists_made_for_sd1_are_cut_for_sdxl() -> None:
    """The 25 become ``w[:9] + w[12:22]``, as everywhere; BASE stays BASE."""
    inside = RAMP[1:]
    cut = inside[:9] + inside[12:22]
    assert list(parse_blocks(inside, "sdxl").values()) == cut
    assert list(parse_blocks(RAMP, "sdxl").values()) == [RAMP[0], *cut]
    assert list(parse_blocks(RAMP, "sdxl")) == list(SDXL.blocks)
    assert Weights(blocks=tuple(RAMP)).notes(SDXL) == (
        "sdxl has no IN09, IN10, IN11, OUT09, OUT10, OUT11: of 26 block weights made for SD1 these are let go",
    )
    assert Weights(blocks=tuple(RAMP)).notes(SD1) == Weights(blocks=tuple(RAMP[:20])).notes(SDXL) == ()
    assert Weights(blocks="preset:COSINE").notes(SDXL)
    assert not Weights(0.5).notes(SDXL)


@pytest.mark.parametrize(
    ("count", "family", "said"),
    [
        (24, "sd1", "24 block weights for sd1 (expected 26 or 25)"),
        (20, "sd1", "20 block weights for sd1 (expected 26 or 25)"),
        (18, "sdxl", "18 block weights for sdxl (expected 20 or 19 or 26 or 25)"),
        (26, "flux", "26 block weights for flux (expected 61)"),
        (26, "sd3", "26 block weights for sd3 (expected 25 or 24 or 39 or 38)"),
    ],
)
def test_wrong_numbers_of_weights(count: int, family: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_blocks([0.5] * count, family)
    assert str(caught.value) == said


def test_presets_by_name() -> None:
    values = PRESETS["GRAD_V"]
    assert parse_blocks("Preset: grad_v", "sd1") == dict(zip(SD1.blocks, values, strict=True))
    assert list(parse_blocks("preset:GRAD_V", "sdxl").values()) == [*values[:10], *values[13:23]]
    assert parse_blocks("preset:ALL_B", "sdxl-refiner") == dict.fromkeys(SD1.blocks, 1.0)


def test_pairs_and_mappings() -> None:
    wanted = {"IN00": 0.3, "OUT05": 0.7, "OUT06": 0.7, "M00": 0.1}
    assert parse_blocks("in0=0.3, OUT05-out06=0.7,\nmid=.1", "sd1") == wanted
    assert parse_blocks({"IN00": 0.3, "OUT05-OUT06": "0.7", "M": 0.1}, "sd1") == wanted
    assert parse_blocks("IN00-IN02=1,IN01=0", "sd1") == {"IN00": 1, "IN01": 0, "IN02": 1}
    assert parse_blocks({"BASE": 0.2, "double0": 1}, "flux") == {"CLIP": 0.2, "T5": 0.2, "BASE": 0.2, "D00": 1}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("preset:GRAD_W", "'GRAD_W' is no preset"),
        ("GRAD_V", "block weights are 'GRAD_V' (expected a list of weights, preset:NAME"),
        ("", "block weights are ''"),
        ([], "block weights are []"),
        (0.5, "block weights are 0.5"),
        ("0.5,x,0.5", "block weight 2 is 'x' (expected a finite number)"),
        ("0.5,,0.5", "block weight 2 is ''"),
        ([0.5, True], "block weight 2 is True"),
        ([0.5, None], "block weight 2 is None"),
        ([10**400], "block weight 1 is too large a number"),
        ("IN00=nan", "weight of IN00 is 'nan'"),
        ("IN00=", "'IN00' without a block or a weight"),
        ("=1", "'' without a block or a weight"),
        ("IN00=1,0.5", "'0.5' without a block or a weight"),
        ("IN00=1,in0=0", "name IN00 twice"),
        ("IN00=1,IN15=0", "'IN15' is no block of sd1"),
        ({"QUT01": 1}, "did you mean 'OUT01'?"),
    ],
)
def test_what_cannot_be_read_is_one_line(spec: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_blocks(spec, "sd1")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_presets_are_for_unets() -> None:
    with pytest.raises(RequestError, match="preset:GRAD_V is a curve over the blocks of a UNet, which flux has not"):
        Weights(0.5, "preset:GRAD_V").check(FLUX)


def test_the_closer_word_counts() -> None:
    plain = Weights(0.5)
    parts = Weights(0.5, unet=0.1, te=0.2, vae=0.3)
    listed = Weights(0.5, {"IN04": 0.4}, unet=0.1, te=0.2)
    ruled = Weights(0.5, {"IN04": 0.4}, unet=0.1, rules=(Rule.parse("IN04:attn2:0.9"), Rule.parse("*.to_k.*:0.8")))
    places = (IN01, IN04, OUT, TEXT, VAE, "alphas_cumprod")
    assert [plain.at(name, SD1) for name in places] == [0.5] * 6
    assert [parts.at(name, SD1) for name in places] == [0.1, 0.1, 0.1, 0.2, 0.3, 0.5]
    assert [listed.at(name, SD1) for name in places] == [0.1, 0.4, 0.1, 0.2, 0.5, 0.5]
    assert [ruled.at(name, SD1) for name in places] == [0.1, 0.8, 0.1, 0.5, 0.5, 0.5]


def test_base_does_not_reach_the_vae() -> None:
    weights = Weights(0.5, tuple(RAMP))
    assert weights.at(TEXT, SD1) == RAMP[0]
    assert weights.at(VAE, SD1) == 0.5
    assert Weights(0.5, {"VAE": 1.0}).at(VAE, SD1) == 1.0


def test_a_presets_base_makes_way_for_te() -> None:
    assert Weights(0.5, "preset:GRAD_V").at(TEXT, SD1) == 0.0
    weights = Weights(0.5, "preset:GRAD_V", te=0.25)
    weights.check(SD1)
    assert weights.at(TEXT, SD1) == 0.25
    assert weights.at(IN01, SD1) == PRESETS["GRAD_V"][2]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (Weights(0.5, tuple(RAMP), te=0.1), "te=0.1 has no effect, as BASE has a weight of its own"),
        (Weights(0.5, "preset:GRAD_V", unet=0.1), "unet=0.1 has no effect, as all of its blocks"),
        (Weights(0.5, {"VAE": 0}, vae=0.1), "vae=0.1 has no effect, as VAE"),
        (Weights(blocks=tuple(RAMP)), "VAE has no weight (expected a value"),
        (Weights(blocks=tuple(RAMP[1:]), vae=0), "BASE has no weight"),
        (Weights(unet=1, vae=1), "BASE has no weight"),
        (Weights(0.5, {"IN12": 1.0}), "'IN12' is no block of sd1"),
        (Weights(0.5, tuple(RAMP[:20])), "20 block weights for sd1"),
        (Weights(0.5, rules=(Rule.parse("IN12::1"),)), "rule 'IN12::1.0': 'IN12' is no block of sd1"),
    ],
)
def test_what_does_not_fit_the_family(weights: Weights, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        weights.check(SD1)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "weights",
    [Weights(0.5), Weights(unet=1, te=0, vae=0.5), Weights(blocks=tuple(RAMP), vae=0), Weights(0.5, {"IN00-IN11": 0})],
)
def test_what_fits_the_family(weights: Weights) -> None:
    weights.check(SD1)
    assert all(weights.at(name, SD1) in weights.numbers for name in (IN01, OUT, TEXT, VAE))


def test_a_list_for_the_smaller_sd3_is_whole() -> None:
    Weights(blocks=tuple(RAMP[:25]), vae=0).check(table("sd3"))


def test_a_tensor_without_weight_is_named() -> None:
    with pytest.raises(RequestError, match="'alphas_cumprod': has no weight, and lies in BASE"):
        Weights(unet=1, te=0, vae=0).at("alphas_cumprod", SD1)


def test_numbers_are_all_that_it_can_be() -> None:
    weights = Weights(1, {"IN00": 2}, unet=3, te=4, vae=5, rules=(Rule.parse("*:6"),))
    assert sorted(weights.numbers) == [1, 2, 3, 4, 5, 6]
    assert Weights(0.3, "preset:FLAT_25").numbers == (0.3, *PRESETS["FLAT_25"])


NUMBER = st.floats(-2, 2)
SPEC = (
    st.dictionaries(st.sampled_from(["IN00", "in03-IN07", "M00", "BASE"]), NUMBER)
    | st.lists(NUMBER, min_size=25, max_size=26).map(tuple)
    | st.sampled_from(sorted(PRESETS)).map("preset:{}".format)
)
RULES = st.lists(st.sampled_from(["IN00:attn:0.5", "*.to_k.*:0.25", "NOT M00::1"]), max_size=2)
OPTIONAL = st.none() | NUMBER
ANY = st.builds(
    lambda value, spec, unet, te, vae, rules: Weights(value, spec, unet, te, vae, tuple(map(Rule.parse, rules))),
    OPTIONAL, SPEC, OPTIONAL, OPTIONAL, OPTIONAL, RULES,
)  # fmt: skip


@given(ANY)
def test_what_is_written_reads_back_as_the_same(weights: Weights) -> None:
    again = Weights.from_yaml(json.loads(json.dumps(weights.to_yaml())))
    assert again == weights
    assert hash(again) == hash(weights)
    assert again.numbers == weights.numbers


@given(ANY, ANY)
def test_different_weights_are_different(one: Weights, other: Weights) -> None:
    assert (one == other) == (one.to_yaml() == other.to_yaml() and str(one.blocks) == str(other.blocks))


def test_a_number_is_enough() -> None:
    assert Weights.from_yaml(0.5) == Weights(0.5) == Weights.from_yaml({"value": 0.5, "te": None})
    assert Weights.from_yaml({"rules": "*:1, M00::0"}).rules == (Rule.parse("*:1"), Rule.parse("M00::0"))
    assert Weights(0.5) != 0.5


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"vlaue": 0.5},
            "'vlaue' is no field of block weights (expected value, unet, te, vae, blocks, rules); did you",
        ),
        ({1: 0.5}, "1 is no field"),
        ({"te": "much"}, "te is 'much' (expected a finite number)"),
        ({"rules": 5}, "rules is 5 (expected a list of rules)"),
        ({"rules": [5]}, "rule 5 is no text"),
        ({"blocks": 5}, "block weights are 5"),
        ([0.5], "value is [0.5]"),
        (None, "value is None"),
    ],
)
def test_data_that_is_no_weights(data: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        Weights.from_yaml(data)
    assert said in str(caught.value)


def test_the_command_prints_the_table() -> None:
    shown = CliRunner().invoke(blocks, ["sd1"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for text in (
        "lists of 26 or 25 weights",
        "input_blocks.4.*",
        "down_blocks.1.resnets.0.*",
        "first_stage_model.*",
        " 197 ",
    ):
        assert text in shown.stdout
    data = json.loads(CliRunner().invoke(blocks, ["FLUX", "--json"]).stdout)
    assert (data["family"], data["counts"], len(data["blocks"])) == ("flux", [61], 62)
    assert data["blocks"][3] == {
        "block": "D00",
        "single_file": ["double_blocks.0.*"],
        "diffusers": ["transformer_blocks.0.*"],
        "tensors": 24,
    }
    assert data["aliases"]["SINGLE37"] == ["S37"]


def test_the_command_lists_presets() -> None:
    shown = CliRunner().invoke(blocks, ["--presets"]).stdout
    assert "▁▂▂▃▃▄▅▅▆▆▇▇█▇▇▆▆▅▅▄▃▃▂▂▁" in next(line for line in shown.splitlines() if "GRAD_A" in line)
    assert sum(any(c in line for c in "▁█▃▆") for line in shown.splitlines()) == 38
    assert len(json.loads(CliRunner().invoke(blocks, ["--presets", "--json"]).stdout)) == 38
    assert spark([-1, 0, 0.5, 1, 2]) == "▁▁▅██"


def test_the_command_wants_a_family() -> None:
    assert CliRunner().invoke(blocks, []).exit_code == 2
    assert CliRunner().invoke(blocks, ["sd1", "--presets"]).exit_code == 2
    assert isinstance(CliRunner().invoke(blocks, ["sd9"]).exception, SdmergeError)
