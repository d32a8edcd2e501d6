"""``sdmerge sample``: pictures over prompts, seeds, strengths of adapters and parameters of a recipe, on one sheet."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmerge import pictures
from sdmerge.api import combinations
from sdmerge.applied import Files, apply
from sdmerge.errors import RequestError, nearest
from sdmerge.options import Options
from sdmerge.recipe import Addition, Input, Model, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL.Image import Image

    from sdmerge.options import OptionFields
    from sdmerge.sampling import Painting
    from sdmerge.train.log import Tell
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import ModelSettings

    Point = tuple[tuple[str, Any], ...]

_MOST = 400
PROMPT, SEED, STRENGTH = "prompt", "seed", "strength"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be painted.

    Attributes:
        model: a file or folder, and how its networks are described; its `model` may be empty where there is a recipe.
        adapters: each with its strength.
        recipe: a YAML file in the model's place.
        changes: values for what the recipe has under ``set``.
        over: values that are swept.
        strengths: factors of the adapters' strengths.
        files: embeddings and inversions.
        grid: ``rows:columns``, names of axes with commas between them; empty: prompts make columns, all else rows.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: fp32, fp16 or bf16.
    """

    model: ModelSettings
    output: Path
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    painting: Painting
    adapters: tuple[tuple[Path, float], ...] = ()
    recipe: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    over: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    strengths: tuple[float, ...] = ()
    files: Files = field(default_factory=Files)
    grid: str = ""
    overwrite: bool = False
    device: str = "auto"
    precision: str = "fp32"

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What differs between pictures: values by name. Those of the weights come first."""
        found: dict[str, tuple[Any, ...]] = {name: tuple(values) for name, values in self.over.items()}
        if self.strengths:
            found[STRENGTH] = self.strengths
        return found | {SEED: self.seeds, PROMPT: self.prompts}


def sample(request: Request, tell: Tell) -> tuple[int, int]:
    """Paint the sheet; return its rows and columns.

    Raises:
        RequestError: the request cannot be fulfilled.
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    _check(request)
    rows, columns = _arranged(request)
    weights = [name for name in request.axes if name not in (SEED, PROMPT)]
    total = len(list(product(*request.axes.values())))
    found: dict[Point, Image] = {}
    with tell.progress("painting", total) as advance:
        for point, networks in _variants(request):
            _place(networks, request)
            beside = apply(request.files, networks, request.model)
            for note in beside.notes:
                tell.warn(note)
            pairs = list(product(request.seeds, request.prompts))
            from sdmerge.sampling import paint

            painted = paint(
                networks,
                [prompt for _, prompt in pairs],
                [seed for seed, _ in pairs],
                request.painting,
                lambda done: advance(done, ""),
                beside,
            )
            values = [(name, point[name]) for name in weights]
            for (seed, prompt), image in zip(pairs, painted, strict=True):
                found[(*values, (SEED, seed), (PROMPT, prompt))] = image
    grid = [[found[_point(request.axes, row, column)] for column in columns] for row in rows]
    labels = [(_label(row), "") for row in rows]
    made = pictures.sheet("", labels, [_label(column) for column in columns], grid)
    pictures.save(made, request.output, overwrite=request.overwrite)
    return len(rows), len(columns)


def _check(request: Request) -> None:
    if not request.prompts:
        raise RequestError("there is no prompt (expected at least one, with --prompt)")
    if request.output.suffix.lower() != ".png":
        raise RequestError(f"{request.output}: pictures are PNG files (expected a name that ends in .png)")
    if request.recipe is None and (request.over or request.changes):
        raise RequestError("--sweep and --set change a recipe; give one with --recipe")
    if request.recipe is not None and (request.model.model or request.adapters):
        raise RequestError("a recipe names its models and adapters itself (expected either a model or a recipe)")
    if request.recipe is None and not request.model.model:
        raise RequestError("there is no model (expected a file, a folder, or a recipe with --recipe)")
    if request.strengths and not request.adapters:
        raise RequestError("--strengths are for adapters; give one with --adapter")
    count = len(list(product(*request.axes.values())))
    if count > _MOST:
        raise RequestError(f"that makes {count:,} pictures (expected {_MOST} at most)")


def _arranged(request: Request) -> tuple[list[Point], list[Point]]:
    """Return the points of rows and columns.

    Raises:
        RequestError: `grid` names what is no axis, or leaves one out that has several values.
    """
    axes = request.axes
    several = [name for name, values in axes.items() if len(values) > 1]
    sides = ([name for name in several if name != PROMPT], [PROMPT])
    if len(several) == 1 and several[0] != PROMPT:
        sides = ([], several)
    if request.grid:
        rows, colon, columns = request.grid.partition(":")
        sides = tuple([name.strip() for name in side.split(",") if name.strip()] for side in (rows, columns))  # type: ignore[assignment]
        named = [*sides[0], *sides[1]]
        for name in named:
            if name not in axes:
                raise RequestError(f"grid names {name!r} (expected {', '.join(axes)}){nearest(name, axes)}")
        left = [name for name in several if name not in named]
        if not colon or len(set(named)) < len(named) or left:
            wanted = "rows:columns, each axis of several values once"
            raise RequestError(f"grid is {request.grid!r} (expected {wanted}: {', '.join(several)})")
    made = [
        [tuple(zip(side, values, strict=True)) for values in product(*(axes[name] for name in side))] for side in sides
    ]
    return made[0], made[1]


def _point(axes: Mapping[str, Sequence[Any]], row: Point, column: Point) -> Point:
    """Return a picture's place on every axis, in the order of the axes."""
    given = dict(row) | dict(column)
    return tuple((name, given.get(name, values[0])) for name, values in axes.items())


def _label(point: Point) -> str:
    return ", ".join(str(value) if name == PROMPT else f"{name} {_shown(value)}" for name, value in point)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _variants(request: Request) -> Iterator[tuple[Mapping[str, Any], Networks]]:
    """Yield the networks for every value of what changes the weights. What is merged is merged in memory."""
    from sdmerge.memory import merged
    from sdmerge.train.beside import put, stands_beside
    from sdmerge.train.loading import build, load

    beside = [one for one in request.adapters if stands_beside(one[0])]
    baked = [one for one in request.adapters if one not in beside]
    points, recipes, options = _recipes(request, baked)
    settings = request.model
    if recipes:
        settings = replace(settings, model=str(recipes[0].inputs[recipes[0].ids[0]].path))
    models = merged(recipes, options) if recipes else iter(())
    for point in points:
        networks = build(next(models), settings) if recipes else load(settings)
        for path, strength in beside:
            put(networks, path, strength * point.get(STRENGTH, 1.0))
        yield point, networks


def _recipes(
    request: Request, baked: Sequence[tuple[Path, float]]
) -> tuple[list[dict[str, Any]], list[Recipe], Options]:
    """Return what differs from variant to variant, and a recipe for each; no recipes where nothing is merged."""
    if request.recipe is not None:
        from sdmerge import recipe_file

        points = combinations(request.over)
        recipes = [recipe_file.load(request.recipe, {**request.changes, **point}) for point in points]
        given: OptionFields = {} if request.model.family is None else {"family": request.model.family}
        return points, recipes, Options(**{**recipes[0].options, **given})
    points = [{STRENGTH: factor} for factor in request.strengths] or [{}]
    inputs = {"A": Input(Path(request.model.model))} | {f"L{i}": Input(path) for i, (path, _) in enumerate(baked, 1)}
    recipes = []
    for point in points if baked else ():
        factor = point.get(STRENGTH, 1.0)
        added = tuple(Addition(f"L{i}", strength * factor) for i, (_, strength) in enumerate(baked, 1))
        recipes.append(Recipe(Model("A", added), inputs))
    return points, recipes, Options(dtype="fp32", family=request.model.family)


def _place(networks: Networks, request: Request) -> None:
    """Move the networks to where pictures are painted."""
    import torch

    from sdmerge.run import pick_device
    from sdmerge.train.networks import TYPES

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(Options(device=auto if request.device == "auto" else request.device))
    networks.to(device, TYPES[request.precision])
