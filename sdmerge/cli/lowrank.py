"""``sdmerge resize-lora`` and ``merge-lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options

if TYPE_CHECKING:
    from sdmerge.lora.combine import How

_limits = options.together(
    options.limits("module", "64MB"),
    click.option(
        "--to", metavar="LAYOUT", help="The layout to write; `sdmerge layouts` lists them. Default: the input's."
    ),
    click.option("--report", type=click.Path(), metavar="FILE", help="Write each module's rank and error, as JSON."),
    click.option("--plot", type=click.Path(), metavar="FILE", help="Paint ranks and energy over the modules, as PNG."),
    options.OUTPUT,
)
_CHOSEN = ("output", "rank", "size", "energy", "error", "to", "report", "plot")


@click.command("resize-lora")
@click.argument("lora", type=click.Path())
@_limits
@options.ADAPTER_CONFIG
@options.combination_options
def resize_lora(lora: str, as_json: bool, **given: Any) -> None:
    """Give an adapter smaller ranks, with the least error."""
    from sdmerge import adapters as api

    chosen = {name: given.pop(name) for name in (*_CHOSEN, "adapter_config")}
    options.show([api.resize_lora(lora, **chosen, **options.api_options(given))], as_json=as_json)


@click.command("merge-lora")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:STRENGTH] ...")
@click.option(
    "--method",
    type=click.Choice(["sum", "svd", "ties", "dare"]),
    default="sum",
    show_default=True,
    help="sum is exact where no rank is asked for.",
)
@click.option("-p", "parameters", multiple=True, metavar="NAME=VALUE", help="A parameter of ties or dare: density=0.2.")
@_limits
@options.combination_options
def merge_lora(
    adapters: tuple[str, ...], method: How, parameters: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Merge adapters into one: LoRA, LoHa, LoKr and mixes of them."""
    from sdmerge import adapters as api
    from sdmerge.cli import weights
    from sdmerge.lora.combine import dense_method
    from sdmerge.lora.strength import parse_strength

    chosen = {name: given.pop(name) for name in _CHOSEN}
    values = weights.parsed(dense_method(method), parameters) if parameters else {}
    pairs = [parse_strength(text) for text in adapters]
    report = api.merge_lora(pairs, method=method, parameters=values, **chosen, **options.api_options(given))
    options.show([report], as_json=as_json)
