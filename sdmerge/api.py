"""The functions that ``import sdmerge`` shows. The command line calls these and nothing else."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sdmerge.arguments import path_of
from sdmerge.errors import RequestError
from sdmerge.execute import Report, execute
from sdmerge.options import OptionFields, Options
from sdmerge.recipe import LABELS, Input, Merge, Model, Recipe
from sdmerge.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdmerge.arguments import PathLike
    from sdmerge.blocks import Weights
    from sdmerge.options import Form, Only, Prediction

__all__ = [
    "Report",
    "add_difference",
    "convert",
    "join",
    "merge",
    "run_recipe",
    "split",
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


def convert(
    source: PathLike,
    output: PathLike,
    *,
    to: str | None = None,
    form: Form | None = None,
    allow_loss: bool = False,
    adapter_config: PathLike | None = None,
    base: PathLike | None = None,
    token: str | None = None,
    for_family: str | None = None,
    preview: PathLike | None = None,
    only: Only | None = None,
    shard_size: str | int | None = None,
    prediction: Prediction | None = None,
    tokenizer: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Write a model as a single file or as a diffusers folder; an adapter, an embedding, a small file in another layout.

    Args:
        source: what to read.
        output: where to write: a file whose name tells its container, or a folder. Of an embedding: ``.safetensors``,
            ``.pt``, ``.bin``, ``.png``; no ending for diffusers' two files in a folder.
        to: ``single-file`` or ``diffusers`` for models; a layout, as ``sdmerge layouts`` lists them, for others. None keeps
            every name, and of an embedding means the usual layout for the output's ending.
        form: turn every record of an adapter into ``lora`` or ``full`` differences.
        allow_loss: leave out what the layout cannot hold, and note it, instead of refusing.
        adapter_config: PEFT's ``adapter_config.json``, where it is not beside the file.
        base: the model that an adapter is for, where a change depends on its weights or shapes.
        token: what an embedding's word is called; None: as it was, or after the file.
        for_family: refuse an embedding that is for another family.
        preview: the picture that an embedding in a PNG is put beside; None: one of its vectors is painted.
        only: write one part of a model: its network, its text encoders, or its VAE.
        shard_size: bytes in a file of a diffusers folder, at most: a number, or as ``5GB``.
        prediction: what a model predicts, where nothing in it tells: for the folder's scheduler.
        tokenizer: a folder with tokenizers, to copy into the diffusers folder.
        options: see `Options`.

    Raises:
        See `add_difference`; `sdformats.adapters.errors.CannotHold` where the layout has no place for something.
    """
    from sdmerge.conversion import Conversion
    from sdmerge.conversion import convert as convert_file

    conversion = Conversion(
        to=to,
        form=form,
        allow_loss=allow_loss,
        adapter_config=path_of(adapter_config),
        base=path_of(base),
        token=token,
        for_family=for_family,
        preview=path_of(preview),
        only=only,
        shard_size=parse_size(shard_size),
        prediction=prediction,
        tokenizer=path_of(tokenizer),
    )
    return convert_file(Path(source), Path(output), conversion, Options(**options))


def split(source: PathLike, folder: PathLike, **options: Unpack[OptionFields]) -> list[Report]:
    """Write each component of a model into a file of its own: ``unet.safetensors``, ``vae.safetensors``, and so on.

    Args:
        source: a model, in either spelling.
        folder: where to write; made if it is missing.
        options: see `Options`.

    Raises:
        as `add_difference`.
    """
    from sdmerge.parts import split as split_model

    return split_model(Path(source), Path(folder), Options(**options))


def join(
    parts: Sequence[PathLike],
    output: PathLike,
    *,
    to: str | None = None,
    shard_size: str | int | None = None,
    prediction: Prediction | None = None,
    tokenizer: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> Report:
    """Put a model together from models and components; a later part takes the place of what is there.

    Args:
        parts: paths; ``component=path`` takes nothing but this component of a file, or says which text encoder it is.
        output: a file, or a diffusers folder.
        to: ``single-file`` or ``diffusers``; None: as the output's name ends.
        shard_size, prediction, tokenizer: as in `convert`.
        options: see `Options`.

    Raises:
        as `add_difference`.
    """
    from sdmerge.conversion import Conversion
    from sdmerge.parts import join as join_parts

    conversion = Conversion(
        to=to,
        shard_size=parse_size(shard_size),
        prediction=prediction,
        tokenizer=path_of(tokenizer),
    )
    return join_parts([str(part) for part in parts], Path(output), conversion, Options(**options))


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
