"""``sdmerge demo``."""

from __future__ import annotations

from pathlib import Path

import click

from sdmerge.cli import screen


@click.command("demo")
@click.argument("directory", metavar="[DIR]", type=click.Path(file_okay=False), default="demo")
def demo(directory: str) -> None:
    """Merge three tiny models and paint what they learned."""
    from sdmerge.demo import run_demo

    for path in run_demo(Path(directory)).paths:
        screen.out(path)
