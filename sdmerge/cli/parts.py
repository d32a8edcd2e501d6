"""``sdmerge split`` and ``sdmerge join``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options


@click.command("split")
@click.argument("model", metavar="MODEL", type=click.Path())
@click.argument("folder", metavar="DIR", type=click.Path())
@options.output_options  # fmt: skip
def split(model: str, folder: str, as_json: bool, **given: Any) -> None:
    """Write each component of a model into a file of its own."""
    from sdmerge import api

    options.show(api.split(model, folder, **options.api_options(given)), as_json=as_json)


@click.command("join")
@click.argument("parts", nargs=-1, required=True, metavar="[COMPONENT=]PART ...")
@click.option("-o", "--output", required=True, type=click.Path(), help="A file, or a folder in diffusers' layout.")
@click.option("--to", metavar="LAYOUT", help="single-file or diffusers. Default: as the output's name ends.")
@options.folder_options
@options.output_options  # fmt: skip
def join(parts: tuple[str, ...], output: str, as_json: bool, **given: Any) -> None:
    """Put a model together from components; a later part takes the place of what is there."""
    from sdmerge import api

    chosen = {name: given.pop(name) for name in ("to", "shard_size", "prediction", "tokenizer")}
    options.show([api.join(parts, output, **chosen, **options.api_options(given))], as_json=as_json)
