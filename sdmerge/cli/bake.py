"""``sdmerge bake``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options


@click.command("bake")
@click.argument("model", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:STRENGTH] ...")
@click.option(
    "--te-strength",
    type=float,
    metavar="S",
    help="Strength in the text encoders; 0 leaves these out.",
)
@click.option(
    "--blocks",
    metavar="WEIGHTS",
    help="Strength by block, for all adapters: 0,0.1,... or preset:GRAD_V or IN00=0.3,OUT05-OUT08=0.7.",
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="RULE",
    help='Strength of single tensors: "IN00-IN05:attn2:0.3" or "*.attn1.*:0.2".',
)
@click.option(
    "--stochastic-rounding",
    type=int,
    metavar="SEED",
    is_flag=False,
    flag_value=0,
    help="Round up or down with the probability of the nearness: weak adapters survive bf16 and fp8.",
)
@options.bake_options  # fmt: skip
def bake(
    model: str,
    adapters: tuple[str, ...],
    te_strength: float | None,
    blocks: str | None,
    rules: tuple[str, ...],
    **given: Any,
) -> None:
    """Add adapters (LoRA and its relatives) to a model's weights."""
    from sdmerge import adapters as api
    from sdmerge.blocks import Weights
    from sdmerge.lora.strength import parse_strength

    output, as_json = given.pop("output"), given.pop("as_json")
    said = {"te": te_strength, "blocks": blocks, "rules": list(rules) or None}
    chosen = {name: value for name, value in said.items() if value is not None}
    pairs = [parse_strength(text) for text in adapters]
    strengths = [(path, Weights.from_yaml({"value": s, **chosen}) if chosen else s) for path, s in pairs]
    report = api.bake(model, strengths, output=output, **options.api_options(given))
    options.show([report], as_json=as_json)
