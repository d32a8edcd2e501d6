"""``sdmerge convert``."""

from __future__ import annotations

from typing import Any, get_args

import click

from sdmerge.cli import options
from sdmerge.options import Form, Only

_CHOSEN = (
    *("to", "allow_loss", "adapter_config", "base"),
    *("token", "for_family", "preview"),
    *("only", "shard_size", "prediction", "tokenizer"),
)


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("output", metavar="OUT", type=click.Path())
@click.option(
    "--to",
    metavar="LAYOUT",
    help="For models: single-file or diffusers. For others: the layout to write; `sdmerge layouts` lists them.",
)
@click.option(
    "--as",
    "wanted",
    metavar="lora|full|KIND",
    help="For adapters: turn every algorithm into LoRA, or into whole differences. For a file that could be several things: "
    "what it is (aesthetic, embedding, ...).",
)
@click.option("--allow-loss", is_flag=True, help="Leave out what the layout cannot hold, and say so.")
@options.ADAPTER_CONFIG
@click.option(
    "--base",
    type=click.Path(),
    metavar="MODEL",
    help="The model that the adapter is for, where a change depends on its weights.",
)
@options.TOKEN
@options.FOR
@click.option(
    "--preview",
    type=click.Path(),
    metavar="PICTURE",
    help="The picture that an embedding in a PNG is put beside. Default: one of its vectors.",
)
@click.option(
    "--only", type=click.Choice(get_args(Only)), help="For models: write one part (unet is a transformer, too)."
)
@options.folder_options
@options.output_options  # fmt: skip
def convert(source: str, output: str, wanted: str | None, as_json: bool, **given: Any) -> None:
    """Write a model as one file or as a diffusers folder; adapters, embeddings, small files in other layouts."""
    from sdmerge import api

    chosen = {name: given.pop(name) for name in _CHOSEN}
    chosen["form" if wanted in get_args(Form) else "kind"] = wanted
    options.show([api.convert(source, output, **chosen, **options.api_options(given))], as_json=as_json)
