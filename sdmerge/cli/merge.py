"""``sdmerge add-diff`` and ``sdmerge weighted``."""

from __future__ import annotations

from typing import Any

import click

from sdmerge.cli import options


@click.command("add-diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.argument("c", type=click.Path())
@click.option("--alpha", type=float, default=1.0, show_default=True, help="How much of the difference is added.")
@options.merge_options
def add_diff(a: str, b: str, c: str, alpha: float, output: str, as_json: bool, **given: Any) -> None:
    """A + alpha (B - C): give A what B learned over C."""
    from sdmerge import api

    report = api.add_difference(a, b, c, alpha=alpha, output=output, **options.api_options(given))
    options.show(report, as_json=as_json)


class _Weights(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic only in newer click
    name = "W,W,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers like 0.5,0.3,0.2", param, ctx)


@click.command("weighted")
@click.argument("models", type=click.Path(), nargs=-1, required=True, metavar="A B [C ...]")
@click.option("--alpha", type=float, help="For two models: (1 - alpha) A + alpha B. Default: 0.5.")
@click.option("--weights", type=_Weights(), help="One for each model, as they are.")
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@options.merge_options
def weighted(
    models: tuple[str, ...],
    alpha: float | None,
    weights: tuple[float, ...] | None,
    normalize: bool,
    output: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Weighted sum of two or more models."""
    from sdmerge import api

    if len(models) < 2:
        raise click.UsageError("a weighted sum needs at least two models")
    if weights is not None and alpha is not None:
        raise click.UsageError("--alpha and --weights exclude each other")
    if weights is not None and len(weights) != len(models):
        raise click.UsageError(f"--weights has {len(weights)} numbers for {len(models)} models")
    if weights is None and len(models) > 2:
        raise click.UsageError(f"{len(models)} models need --weights, one for each; --alpha is for two models")
    report = api.weighted_sum(
        models, weights=weights, alpha=alpha, normalize=normalize, output=output, **options.api_options(given)
    )
    options.show(report, as_json=as_json)
