"""``sdmerge extract-lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options

if TYPE_CHECKING:
    from os import PathLike


_CHOSEN = (
    *("output", "rank", "size", "energy", "error", "conv_rank", "conv"),
    *("to", "tolerance", "clamp", "report", "plot"),
)


class _Share(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic only in newer click
    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is no share (expected 1% or 0.01)", param, ctx)


@click.command("extract-lora")
@click.argument("tuned", type=click.Path())
@click.argument("base", type=click.Path())
@options.OUTPUT
@options.limits("layer", "64MB", default="64")
@click.option("--conv-rank", type=click.IntRange(1), metavar="R", help="The rank of convolutions, where it is another.")
@click.option(
    "--conv",
    type=click.Choice(["flat", "tucker"]),
    default="flat",
    show_default=True,
    help="What convolutions become: two factors, or Tucker's thin ones with a core, where that is smaller.",
)
@click.option(
    "--also", multiple=True, metavar="SIZE=FILE", help="One more file, of that size, from the same extraction."
)
@click.option("--to", metavar="LAYOUT", help="The layout to write; `sdmerge layouts` lists them.")
@click.option(
    "--tolerance",
    type=_Share(),
    default="1%",
    show_default=True,
    help="How much larger than the smallest possible a layer's error may be.",
)
@click.option("--no-te", is_flag=True, help="Leave the text encoders alone.")
@click.option("--clamp", type=float, metavar="Q", help="Cut factors at this quantile, as some scripts do (0.99).")
@click.option("--report", type=click.Path(), metavar="FILE", help="Write each layer's rank, error and bound, as JSON.")
@click.option("--plot", type=click.Path(), metavar="FILE", help="Paint ranks and energy over the layers, as PNG.")
@options.extraction_options  # fmt: skip
def extract_lora(tuned: str, base: str, no_te: bool, also: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Extract a LoRA of what a model changed over another."""
    from sdmerge import adapters as api

    sizes: dict[str | PathLike[str], int | str] = {}
    for text in also:
        size, equals, path = text.partition("=")
        if not equals or not path:
            raise click.UsageError(f"--also {text} names no file (expected SIZE=FILE)")
        sizes[path] = size
    chosen = {name: given.pop(name) for name in _CHOSEN}
    reports = api.extract_lora(tuned, base, also=sizes, text_encoders=not no_te, **chosen, **options.api_options(given))
    options.show(reports, as_json=as_json)
