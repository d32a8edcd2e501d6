"""``sdmerge embedding``: mix, stack, slice, extract, bundle."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options

_TO = click.option(
    "--to",
    metavar="LAYOUT",
    help="The layout to write; `sdmerge layouts` lists them. Default: the usual one for the output's ending.",
)
_OUTPUT = click.option(
    "-o", "--output", required=True, type=click.Path(), help="Where to write: .safetensors, .pt, .png, ..."
)
_written = options.together(options.output_options, _OUTPUT, _TO, options.TOKEN, options.FOR)
_CHOSEN = ("output", "to", "token", "for_family")


@click.group("embedding")
def embedding() -> None:
    """Mix, stack, slice, extract and bundle textual-inversion embeddings."""


@embedding.command("mix")
@click.argument("embeddings", nargs=-1, required=True, metavar="EMBEDDING[:WEIGHT] ...")
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@click.option("--pad", is_flag=True, help="Let missing vectors count as zeros, where the numbers of vectors differ.")
@click.option("--keep-norm", is_flag=True, help="Give each vector the average length of those that it is made of.")
@_written
def mix(embeddings: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Average embeddings' vectors, with weights."""
    from sdmerge import embeddings as api
    from sdmerge.lora.strength import parse_strength

    chosen = {name: given.pop(name) for name in (*_CHOSEN, "normalize", "pad", "keep_norm")}
    pairs = [parse_strength(text) for text in embeddings]
    weighted = any(str(path) != text for (path, _), text in zip(pairs, embeddings, strict=True))
    inputs: Any = pairs if weighted else [path for path, _ in pairs]
    options.show([api.mix_embeddings(inputs, **chosen, **options.api_options(given))], as_json=as_json)


@embedding.command("stack")
@click.argument("embeddings", nargs=-1, required=True, type=click.Path(), metavar="EMBEDDING ...")
@_written
def stack(embeddings: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Put embeddings' vectors one after the other."""
    from sdmerge import embeddings as api

    chosen = {name: given.pop(name) for name in _CHOSEN}
    options.show([api.stack_embeddings(embeddings, **chosen, **options.api_options(given))], as_json=as_json)


@embedding.command("slice")
@click.argument("source", type=click.Path(), metavar="EMBEDDING")
@click.option("--vectors", metavar="0:4", help="Which vectors, counted from 0 as in Python: 0:4, -1, 0,2,5:8.")
@click.option("--word", metavar="TOKEN", help="Which word, where there are several.")
@_written
def slice_command(source: str, as_json: bool, **given: Any) -> None:
    """Take some vectors, or one word of several."""
    from sdmerge import embeddings as api

    chosen = {name: given.pop(name) for name in (*_CHOSEN, "vectors", "word")}
    options.show([api.slice_embedding(source, **chosen, **options.api_options(given))], as_json=as_json)


@embedding.command("extract")
@click.argument("adapter", type=click.Path(), metavar="ADAPTER")
@click.option("--word", metavar="TOKEN", help="Which word, where there are several.")
@_written
def extract(adapter: str, as_json: bool, **given: Any) -> None:
    """Take embeddings out of an adapter."""
    from sdmerge import embeddings as api

    chosen = {name: given.pop(name) for name in (*_CHOSEN, "word")}
    options.show([api.extract_embeddings(adapter, **chosen, **options.api_options(given))], as_json=as_json)


@embedding.command("bundle")
@click.argument("adapter", type=click.Path(), metavar="ADAPTER")
@click.argument("embeddings", nargs=-1, required=True, type=click.Path(), metavar="EMBEDDING ...")
@_OUTPUT
@options.TOKEN
@options.FOR
@options.output_options
def bundle(adapter: str, embeddings: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Put embeddings into an adapter."""
    from sdmerge import embeddings as api

    chosen = {name: given.pop(name) for name in ("output", "token", "for_family")}
    options.show([api.bundle_embeddings(adapter, embeddings, **chosen, **options.api_options(given))], as_json=as_json)
