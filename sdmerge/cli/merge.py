"""Merging: ``add-diff`` and ``weighted``, any method by ``merge``, recipes by ``run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options, weights

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command("add-diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.argument("c", type=click.Path())
@click.option("--alpha", type=float, help="How much of the difference is added. Default: 1.")
@weights.weight_options
@options.merge_options
def add_diff(a: str, b: str, c: str, alpha: float | None, **given: Any) -> None:
    """A + alpha (B - C): give A what B learned over C."""
    _merge("add_difference", (a, b, c), {} if alpha is None else {"alpha": alpha}, None, given)


class _Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic only in newer click
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
@click.option("--weights", "numbers", type=_Numbers(), help="One for each model, as they are.")
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@weights.weight_options
@options.merge_options
def weighted(
    models: tuple[str, ...], alpha: float | None, numbers: tuple[float, ...] | None, normalize: bool, **given: Any
) -> None:
    """Weighted sum of two or more models."""
    if len(models) < 2:
        raise click.UsageError("a weighted sum needs at least two models")
    if numbers is not None and alpha is not None:
        raise click.UsageError("--alpha and --weights exclude each other")
    if numbers is not None and len(numbers) != len(models):
        raise click.UsageError(f"--weights has {len(numbers)} numbers for {len(models)} models")
    if numbers is None and len(models) > 2:
        raise click.UsageError(f"{len(models)} models need --weights, one for each; --alpha is for two models")
    if numbers is not None:
        _merge("linear", models, {"weights": numbers, "normalize": normalize}, None, given)
    else:
        _merge("weighted_sum", models, {} if alpha is None else {"alpha": alpha}, None, given)


@click.command("merge")
@click.argument("method")
@click.argument("models", type=click.Path(), nargs=-1, required=True, metavar="MODEL ...")
@click.option("--base", type=click.Path(), help="The model that the others were made from, where the method needs it.")
@click.option("-p", "parameters", multiple=True, metavar="NAME=VALUE",
              help="A parameter of the method; one number for each model as 0.5,0.3.")  # fmt: skip
@weights.weight_options
@options.merge_options
def merge(method: str, models: tuple[str, ...], base: str | None, parameters: tuple[str, ...], **given: Any) -> None:
    """Merge models by any method; `sdmerge methods` lists them."""
    from sdmerge.method import find

    found = find(method)
    _merge(found.name, models, weights.parsed(found, parameters), base, given)


@click.command("run")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Where to write, if not where the recipe says.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="A value for what the recipe has under set."
)
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="NAME=FROM:TO:STEP", help="Several outputs over one read of the inputs."
)
@options.run_options
@click.pass_context
def run(
    ctx: click.Context,
    /,
    recipe: str,
    output: str | None,
    changes: tuple[str, ...],
    sweeps: tuple[str, ...],
    **given: Any,
) -> None:
    """Carry out a recipe (YAML, or mergekit's)."""
    from sdmerge import api

    as_json = given.pop("as_json")
    fields = options.api_options({n: v for n, v in given.items() if n == "quiet" or _was_given(ctx, n)})
    reports = api.run_recipe(
        recipe, output=output, changes=weights.assignments(changes), over=weights.swept(sweeps), **fields
    )
    options.show(reports, as_json=as_json)


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)


def _merge(method: str, models: Sequence[str], values: dict[str, Any], base: str | None, given: dict[str, Any]) -> None:
    """Merge by a method, with what all merge commands have."""
    from sdmerge import api
    from sdmerge.method import find

    output, as_json = given.pop("output"), given.pop("as_json")
    varied = weights.combined(find(method), len(models), values, given)
    fields = options.api_options(given)
    if over := weights.swept(given["sweeps"]):
        reports = api.sweep(method, models, over, varied, base=base, output=output, **fields)
    else:
        reports = [api.merge(method, models, varied, base=base, output=output, **fields)]
    options.show(reports, as_json=as_json)
