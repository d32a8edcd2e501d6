"""The functions that ``import sdmerge`` shows. The command line calls these and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sdmerge.errors import RequestError
from sdmerge.execute import Report, copy, execute
from sdmerge.options import OptionFields, Options
from sdmerge.recipe import LABELS, Addition, Input, Merge, Model, Recipe

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from sdmerge.blocks import Weights
    from sdmerge.lora.budget import Limit
    from sdmerge.lora.combine import How
    from sdmerge.lora.convert import Form

    PathLike = str | os.PathLike[str]

__all__ = [
    "Report",
    "add_difference",
    "bake",
    "convert",
    "merge",
    "merge_lora",
    "resize_lora",
    "run_recipe",
    "sweep",
    "weighted_sum",
]


def add_difference(
    a: PathLike,
    b: PathLike,
    c: PathLike,
    *,
    alpha: float | Weights = 1.0,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> Report:
    """Write A + alpha (B - C): give A what B learned over C.

    Args:
        a, b, c: checkpoints of one family, in any container.
        alpha: how much of the difference is added; block weights are allowed.
        output: a ``.safetensors`` file (a folder where the models are diffusers folders).
        options: see `sdmerge.options.Options`.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    return merge("add_difference", [a, b, c], {"alpha": alpha}, output=output, **options)


def weighted_sum(
    models: Sequence[PathLike],
    *,
    weights: Sequence[float | Weights] | None = None,
    alpha: float | Weights | None = None,
    normalize: bool = False,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> Report:
    """Write the weighted sum of two or more models.

    Args:
        models: checkpoints of one family, in any container; A first.
        weights: one for each model. Without them there must be two models: (1 - alpha) A + alpha B.
        alpha: B's share; 0.5 where neither it nor weights are given.
        normalize: divide the weights by their sum.
        output: as in `add_difference`.
        options: see `sdmerge.options.Options`.

    Raises:
        as `add_difference`.
    """
    method, values = _sum(len(models), weights, alpha, normalize=normalize)
    return merge(method, models, values, output=output, **options)


def _sum(count: int, weights: Any, alpha: Any, *, normalize: bool) -> tuple[str, dict[str, Any]]:
    """Return the method and its values that a weighted sum means."""
    if weights is not None:
        if alpha is not None:
            raise RequestError("alpha and weights exclude each other; give one of them")
        if len(weights) != count:
            raise RequestError(f"{len(weights)} weights for {count} models (expected one for each)")
        return "linear", {"weights": tuple(weights), "normalize": normalize}
    if count != 2:
        raise RequestError(f"{count} models need --weights, one for each; --alpha is for two models")
    return "weighted_sum", {} if alpha is None else {"alpha": alpha}


def merge(
    method: str,
    models: Sequence[PathLike],
    values: Mapping[str, Any] | None = None,
    *,
    base: PathLike | None = None,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> Report:
    """Merge models by any method.

    Args:
        method: its name, as ``sdmerge methods`` lists it.
        models: A first: its tensors decide what the output holds.
        values: the method's parameters.
        base: the model that the others were made from, for methods that need it.
        output, options: as in `add_difference`.

    Raises:
        as `add_difference`.
    """
    recipe = _recipe(method, models, values or {}, base)
    return execute([recipe], [Path(output)], Options(**options))[0]


def sweep(
    method: str,
    models: Sequence[PathLike],
    over: Mapping[str, Sequence[Any]],
    values: Mapping[str, Any] | None = None,
    *,
    base: PathLike | None = None,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> list[Report]:
    """Merge by one method with several values of its parameters, reading the inputs once.

    Args:
        over: for each swept parameter its values; several parameters give every combination.
        output: ``{alpha}`` in the name stands for the parameter's value; without it, ``-alpha0.5`` is put behind the name.
        method, models, values, base, options: as in `merge`.

    Raises:
        as `add_difference`.
    """
    points = combinations(over)
    recipes = [_recipe(method, models, {**(values or {}), **point}, base) for point in points]
    return execute(recipes, [swept_name(Path(output), point) for point in points], Options(**options))


def run_recipe(
    recipe: PathLike,
    *,
    output: PathLike | None = None,
    changes: Mapping[str, Any] | None = None,
    over: Mapping[str, Sequence[Any]] | None = None,
    **options: Unpack[OptionFields],
) -> list[Report]:
    """Carry out a recipe file; see `sdmerge.recipe_file` for its form. mergekit's YAML is understood as well.

    Args:
        recipe: a YAML file.
        output: where to write; the recipe may say it.
        changes: values for what the recipe names under ``set``.
        over: as in `sweep`, over names under ``set``.
        options: what differs from the recipe's own options.

    Raises:
        as `add_difference`.
    """
    from sdmerge import recipe_file

    points = combinations(over or {})
    recipes = [recipe_file.load(Path(recipe), {**(changes or {}), **point}) for point in points]
    first = recipes[0]
    target = Path(output) if output is not None else first.output
    if target is None:
        raise RequestError(f"{recipe}: names no output; give one with -o")
    targets = [swept_name(target, point) for point in points]
    return execute(recipes, targets, Options(**{**first.options, **options}))


def bake(
    model: PathLike,
    adapters: Sequence[PathLike | tuple[PathLike, float | Weights]],
    *,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> Report:
    """Write a model with adapters (LoRA and all of its relatives) added to its weights.

    Args:
        model: a checkpoint, in any container and spelling.
        adapters: each a file, or a file and its strength: W + Σ strength · ΔW, all changes taken from the model's own
            weights. Block weights are allowed.
        output: a ``.safetensors`` file (a folder where the model is one). Embeddings that the adapters carry are written
            beside it.
        options: see `sdmerge.options.Options`.

    Raises:
        as `add_difference`; MismatchError where an adapter changes modules that the model does not have.
    """
    if not adapters:
        raise RequestError("there is no adapter to bake in (expected at least one)")
    pairs = [(Path(one[0]), one[1]) if isinstance(one, tuple) else (Path(one), 1.0) for one in adapters]
    inputs = {"A": Input(Path(model))} | {f"L{i}": Input(path) for i, (path, _) in enumerate(pairs, 1)}
    additions = tuple(Addition(f"L{i}", strength) for i, (_, strength) in enumerate(pairs, 1))
    recipe = Recipe(Model("A", additions), inputs)
    chosen = Options(**options)
    report = execute([recipe], [Path(output)], chosen)[0]
    from sdmerge.lora.words import write_words

    words = write_words([path for path, _ in pairs], Path(output), chosen)
    return replace(report, notes=(*report.notes, *words))


def convert(
    source: PathLike,
    output: PathLike,
    *,
    to: str | None = None,
    form: Form | None = None,
    allow_loss: bool = False,
    adapter_config: PathLike | None = None,
    base: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write a model's tensors, under their names, as safetensors; or an adapter in another layout.

    Args:
        source: what to read.
        output: where to write: a file, or for PEFT a folder.
        to: an adapter layout, as ``sdmerge layouts`` lists them; None keeps every name.
        form: turn every record of an adapter into ``lora`` or ``full`` differences.
        allow_loss: leave out what the layout cannot hold, and note it, instead of refusing.
        adapter_config: PEFT's ``adapter_config.json``, where it is not beside the file.
        base: the model that the adapter is for, where a change depends on its weights or shapes.
        options: see `Options`.

    Raises:
        See `add_difference`; `sdformats.adapters.errors.CannotHold` where the layout has no place for something.
    """
    if to is None:
        if form is not None or adapter_config is not None or base is not None or allow_loss:
            raise RequestError("these options are for adapters: name the layout to convert to, with to (--to)")
        return copy(Path(source), Path(output), Options(**options))
    from sdmerge.lora.convert import Conversion, convert_adapter

    conversion = Conversion(
        to=to,
        form=form,
        allow_loss=allow_loss,
        adapter_config=None if adapter_config is None else Path(adapter_config),
        base=None if base is None else Path(base),
    )
    return convert_adapter(Path(source), Path(output), conversion, Options(**options))


def resize_lora(
    source: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    size: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    to: str | None = None,
    report: PathLike | None = None,
    adapter_config: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write an adapter with smaller ranks, with the least error: a LoRA, LoHa or LoKr becomes a LoRA.

    One of `rank`, `size`, `energy` and `error` is needed. Differences (norms, biases, whole layers) are kept.

    Args:
        source: the adapter; DoRA must be baked first.
        output: where to write: a file, or for PEFT a folder.
        rank: of every module.
        size: of the file, in bytes or as ``"64MB"``; ranks are chosen for the least error of all modules together.
        energy: the share of each module's squared singular values that is kept.
        error: the largest relative error of a module.
        to: a layout, as ``sdmerge layouts`` lists them; None: the input's, or one for its family.
        report: where to write what became of each module, as JSON.
        adapter_config: PEFT's ``adapter_config.json``, where it is not beside the file.
        options: see `Options`.

    Raises:
        See `convert`.
    """
    from sdmerge.lora.combine import Combination, combine

    wanted = Combination(
        inputs=((Path(source), 1.0),),
        how="svd",
        limit=_limit(rank, size, energy, error),
        to=to,
        report=None if report is None else Path(report),
        adapter_config=None if adapter_config is None else Path(adapter_config),
        resizes=True,
    )
    return combine(wanted, Path(output), Options(**options))


def merge_lora(
    adapters: Sequence[PathLike | tuple[PathLike, float]],
    output: PathLike,
    *,
    method: How = "sum",
    parameters: Mapping[str, Any] | None = None,
    rank: int | None = None,
    size: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    to: str | None = None,
    report: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write one adapter that changes a model as several do together: Σ strength ΔW.

    Without a bound the sum is exact: factors are stacked, and written in float32 where the first adapter's type would
    round them (unless a dtype is asked for).

    Args:
        adapters: LoRA, LoHa, LoKr and mixes of them; each a path, or a path and its strength.
        output: where to write: a file, or for PEFT a folder.
        method: ``sum``; ``svd``, a sum of bounded rank; ``ties`` or ``dare``, which merge whole differences and need a bound.
        parameters: of TIES or DARE, as ``{"density": 0.2}``.
        rank, size, energy, error, to, report: as in `resize_lora`.
        options: see `Options`.

    Raises:
        See `convert`.
    """
    from sdmerge.lora.combine import Combination, combine

    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    wanted = Combination(
        inputs=tuple((Path(path), float(strength)) for path, strength in pairs),
        how=method,
        limit=_limit(rank, size, energy, error),
        parameters=parameters or {},
        to=to,
        report=None if report is None else Path(report),
    )
    return combine(wanted, Path(output), Options(**options))


def _limit(rank: int | None, size: int | str | None, energy: float | None, error: float | None) -> Limit:
    from sdmerge.lora.budget import Limit, parse_size

    return Limit(rank=rank, size=None if size is None else parse_size(size), energy=energy, error=error)


def combinations(over: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the swept values, the last parameter changing fastest; one empty one for none."""
    return [dict(zip(over, point, strict=True)) for point in product(*over.values())]


def swept_name(output: Path, point: Mapping[str, Any]) -> Path:
    """Return an output's name for one point of a sweep; see `sweep`."""
    name = output.name
    for parameter, value in point.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        mark = "{" + parameter + "}"
        if mark in name:
            name = name.replace(mark, shown)
        else:
            stem, dot, suffix = name.rpartition(".")
            name = f"{stem}-{parameter}{shown}{dot}{suffix}" if dot else f"{name}-{parameter}{shown}"
    return output.with_name(name)


def _recipe(method: str, models: Sequence[PathLike], values: Mapping[str, Any], base: PathLike | None) -> Recipe:
    if not 1 <= len(models) <= len(LABELS):
        raise RequestError(f"{len(models)} models to merge (expected 1 to {len(LABELS)})")
    inputs = {label: Input(Path(path)) for label, path in zip(LABELS, models, strict=False)}
    operands = [Model(label) for label in inputs]
    if base is not None:
        inputs["base"] = Input(Path(base))
    return Recipe(Merge.of(method, operands, values, None if base is None else Model("base")), inputs)
