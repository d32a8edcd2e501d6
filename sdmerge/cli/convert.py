"""``sdmerge convert``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("output", metavar="OUT", type=click.Path())
@options.output_options
def convert(source: str, output: str, as_json: bool, **given: Any) -> None:
    """Write a model as safetensors, names kept."""
    from sdmerge import api

    options.show([api.convert(source, output, **options.api_options(given))], as_json=as_json)
