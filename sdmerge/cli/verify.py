"""``sdmerge verify``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options, screen


@click.command("verify")
@click.argument("output", type=click.Path(), metavar="OUT")
@click.option("--inputs", type=click.Path(), help="The folder with the merge's inputs. Default: where OUT lies.")
@options.DEVICE
@options.THREADS
@options.QUIET
@options.AS_JSON
def verify(output: str, inputs: str | None, as_json: bool, **given: Any) -> int:
    """Derive a merge again from its recipe, and compare every byte."""
    from sdmerge.verification import verify as derive

    verdict = derive(output, inputs=inputs, **options.api_options(given))
    if as_json:
        screen.json(
            {
                "path": str(verdict.path),
                "identical": verdict.identical,
                "tensors": verdict.tensors,
                "different": list(verdict.different),
                "missing": list(verdict.missing),
                "extra": list(verdict.extra),
                "inputs": {name: str(path) for name, path in verdict.inputs.items()},
                "made_with": dict(verdict.made_with),
                "notes": list(verdict.notes),
            }
        )
    elif verdict.identical:
        screen.out(
            f"{verdict.path}: identical, {verdict.tensors:,} tensors derived again from {len(verdict.inputs)} models"
        )
    else:
        for what in ("different", "missing", "extra"):
            names = getattr(verdict, what)
            if names:
                screen.out(f"{verdict.path}: {len(names):,} tensors {what}: {', '.join(names[:3])}")
        for note in verdict.notes:
            screen.say(f"note: {note}")
    return 0 if verdict.identical else 1
