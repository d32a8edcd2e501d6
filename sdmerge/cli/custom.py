"""``sdmerge compress-custom`` and ``merge-custom``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options

_BASE = click.option("--base", required=True, type=click.Path(), metavar="MODEL", help="The model that it is for.")
_TO = click.option("--to", metavar="FORM", help="original, delta or diffusers. Default: the input's.")


@click.command("compress-custom")
@click.argument("delta", type=click.Path())
@_BASE
@options.limits("matrix", "10MB")
@_TO
@options.OUTPUT
@options.output_options
def compress_custom(delta: str, output: str, as_json: bool, **given: Any) -> None:
    """Compress a Custom Diffusion delta, with the least error."""
    from sdmerge import custom_diffusion as api

    chosen = {name: given.pop(name) for name in ("base", "rank", "size", "energy", "error", "to")}
    report = api.compress_custom(delta, output, **chosen, **options.api_options(given))
    options.show([report], as_json=as_json)


@click.command("merge-custom")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA:CLASS ...")
@_BASE
@click.option(
    "--captions",
    type=click.Path(),
    metavar="FILE",
    help="Captions of what is to stay, one a line. Default: 200 of ours.",
)
@options.MODEL_CONFIG
@options.TOKENIZER
@_TO
@options.OUTPUT
@options.output_options
def merge_custom(deltas: tuple[str, ...], output: str, as_json: bool, **given: Any) -> None:
    """Merge the concepts of several Custom Diffusion deltas, in closed form.

    Each delta is given with the class of its concept: cat.bin:cat dog.bin:dog.
    """
    from sdmerge import custom_diffusion as api

    pairs = [_parsed(text) for text in deltas]
    chosen = {name: given.pop(name) for name in ("base", "captions", "model_config", "tokenizer", "to")}
    report = api.merge_custom(pairs, output, **chosen, **options.api_options(given))
    options.show([report], as_json=as_json)


def _parsed(text: str) -> tuple[str, str]:
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name.strip() or "/" in name or "\\" in name:
        raise click.BadParameter(
            f"{text!r} names no class (expected FILE:CLASS, as cat.bin:cat)", param_hint="DELTA:CLASS"
        )
    return path, name.strip()
