"""The functions for adapters that ``import sdmerge`` shows, beside those of `sdmerge.api`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sdmerge.arguments import limit_of, path_of
from sdmerge.errors import RequestError
from sdmerge.execute import Report, execute
from sdmerge.options import OptionFields, Options
from sdmerge.recipe import Addition, Input, Model, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdmerge.arguments import PathLike
    from sdmerge.blocks import Weights
    from sdmerge.lora.combine import How
    from sdmerge.lora.extraction import Conv

__all__ = ["bake", "extract_lora", "merge_lora", "resize_lora"]

_RANK = 64
"""Of an extraction without a bound."""


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
    return execute([recipe], [Path(output)], Options(**options))[0]


def extract_lora(
    tuned: PathLike,
    base: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    size: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    conv_rank: int | None = None,
    conv: Conv = "flat",
    also: Mapping[PathLike, int | str] | None = None,
    to: str | None = None,
    tolerance: float = 0.01,
    text_encoders: bool = True,
    clamp: float | None = None,
    report: PathLike | None = None,
    plot: PathLike | None = None,
    **options: Unpack[OptionFields],
) -> list[Report]:
    """Write a LoRA of what a model changed over another: the best approximation, layer by layer.

    Args:
        tuned, base: two models of one family, in any container and spelling.
        output: where to write.
        rank: of every layer; 64 where no other bound is given.
        size, energy, error: other bounds; see `resize_lora`.
        conv_rank: the rank of convolutions wider than a pixel, where it is another.
        conv: ``flat`` gives these two factors; ``tucker`` thin ones and a core, where that is smaller.
        also: further files from the same extraction, each with its size.
        to: a layout; None: sd-scripts' for the family, or LyCORIS's, which has a place for cores.
        tolerance: how much larger than the smallest possible the error of a layer may be.
        text_encoders: whether they are looked at.
        clamp: cut factors at this quantile of their magnitudes, as some scripts do.
        report: where to write each layer's rank, energy, error and bound, as JSON.
        plot: where to paint them, as PNG.
        options: see `Options`; ``dtype`` keep means fp16.

    Raises:
        See `convert`.
    """
    from sdmerge.lora.extract import extract
    from sdmerge.lora.extraction import Extraction

    bounded = any(one is not None for one in (rank, size, energy, error))
    first = (Path(output), limit_of(rank if bounded else _RANK, size, energy, error))
    wanted = Extraction(
        tuned=Path(tuned),
        base=Path(base),
        outputs=(first, *((Path(path), limit_of(size=wanted)) for path, wanted in (also or {}).items())),
        conv_rank=conv_rank,
        conv=conv,
        to=to,
        tolerance=tolerance,
        text_encoders=text_encoders,
        clamp=clamp,
        report=path_of(report),
        plot=path_of(plot),
    )
    return extract(wanted, Options(**options))


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
    plot: PathLike | None = None,
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
        plot: where to paint ranks and energies over the modules, as PNG.
        adapter_config: PEFT's ``adapter_config.json``, where it is not beside the file.
        options: see `Options`.

    Raises:
        See `convert`.
    """
    from sdmerge.lora.combine import Combination, combine

    wanted = Combination(
        inputs=((Path(source), 1.0),),
        how="svd",
        limit=limit_of(rank, size, energy, error),
        to=to,
        report=path_of(report),
        plot=path_of(plot),
        adapter_config=path_of(adapter_config),
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
    plot: PathLike | None = None,
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
        rank, size, energy, error, to, report, plot: as in `resize_lora`.
        options: see `Options`.

    Raises:
        See `convert`.
    """
    from sdmerge.lora.combine import Combination, combine

    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    wanted = Combination(
        inputs=tuple((Path(path), float(strength)) for path, strength in pairs),
        how=method,
        limit=limit_of(rank, size, energy, error),
        parameters=parameters or {},
        to=to,
        report=path_of(report),
        plot=path_of(plot),
    )
    return combine(wanted, Path(output), Options(**options))
