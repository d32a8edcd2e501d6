"""The functions that ``import sdmerge`` shows. The command line calls these and nothing else."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sdformats.errors import OutputExists
from sdformats.files import create_sink, open_source
from sdformats.layout import detect
from sdmerge import provenance
from sdmerge.errors import RequestError
from sdmerge.options import OptionFields, Options
from sdmerge.plan import plan_copy, plan_merge
from sdmerge.policy import LABELS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.step import Plan

    PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        output: the file written (or that would be, in a dry run).
        written: whether it was.
        nbytes: bytes of all its tensors.
        counts: how many tensors were merged, copied, kept for lack of a partner, and so on.
        notes: what was decided on the way, one line each.
        nonfinite, overflowed: accepted faults, elements by tensor.
        seconds: wall time.
    """

    output: Path
    written: bool
    nbytes: int
    tensors: int
    counts: Mapping[str, int]
    family: str | None
    notes: tuple[str, ...]
    seconds: float
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    overflowed: Mapping[str, int] = field(default_factory=dict)


def add_difference(
    a: PathLike, b: PathLike, c: PathLike, *, alpha: float = 1.0, output: PathLike, **options: Unpack[OptionFields]
) -> Report:
    """Write A + alpha (B - C): give A what B learned over C.

    Args:
        a, b, c: checkpoints of one family, in any container.
        alpha: how much of the difference is added.
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
    weights: Sequence[float] | None = None,
    alpha: float | None = None,
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
    if weights is None:
        if len(models) != 2:
            raise RequestError(f"{len(models)} models need --weights, one for each; --alpha is for two models")
        share = 0.5 if alpha is None else alpha
        weights = (1.0 - share, share)
    elif alpha is not None:
        raise RequestError("alpha and weights exclude each other; give one of them")
    if len(weights) != len(models):
        raise RequestError(f"{len(weights)} weights for {len(models)} models (expected one for each)")
    if normalize:
        total = sum(weights)
        if total == 0:
            raise RequestError("weights add up to 0 and cannot be normalized")
        weights = [weight / total for weight in weights]
    return merge("weighted_sum", models, {"weights": tuple(map(float, weights))}, output=output, **options)


def merge(
    method: str,
    models: Sequence[PathLike],
    values: Mapping[str, Any],
    *,
    output: PathLike,
    **options: Unpack[OptionFields],
) -> Report:
    """Merge models by any registered method. See `add_difference` for the arguments and errors."""
    from sdmerge import methods  # noqa: F401 - registers them; late, for it leads to torch
    from sdmerge.method import METHODS

    started = time.perf_counter()
    chosen = Options(**options)
    if method not in METHODS:
        raise RequestError(f"there is no method {method!r}; there are: {', '.join(sorted(METHODS))}")
    if not 2 <= len(models) <= len(LABELS):
        raise RequestError(f"{len(models)} models to merge (expected 2 to {len(LABELS)})")
    complete = METHODS[method].check(len(models), values)
    with ExitStack() as stack:
        with _no_collection():
            opened = [_open(stack, path, chosen) for path in models]
            vae = _open(stack, chosen.vae, chosen) if chosen.vae is not None else None
            plan = plan_merge(METHODS[method], complete, opened, vae, chosen)
        labels = [*LABELS[: len(models)], *(["VAE"] if vae else [])]
        target = Path(output)
        _check_output(target, plan, chosen)
        if chosen.dry_run:
            return _report(plan, target, started)
        inputs = provenance.describe_inputs(plan.sources, labels, chosen)
        metadata = provenance.merge_metadata(plan, method, complete, inputs, chosen, target)
        return _execute(plan, metadata, target, chosen, started, "merging")


def convert(source: PathLike, output: PathLike, **options: Unpack[OptionFields]) -> Report:
    """Write a model's tensors, under their names, as safetensors. See `add_difference` for options and errors."""
    started = time.perf_counter()
    chosen = Options(**options)
    with ExitStack() as stack:
        with _no_collection():
            opened, seen = _open(stack, source, chosen)
            plan = plan_copy(opened, seen, chosen)
        target = Path(output)
        _check_output(target, plan, chosen)
        if chosen.dry_run:
            return _report(plan, target, started)
        return _execute(plan, provenance.convert_metadata(opened), target, chosen, started, "converting")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking all of torch because some thousand headers were read (0.1 s each time)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _open(stack: ExitStack, path: PathLike, options: Options) -> tuple[TensorSource, Detection]:
    source = stack.enter_context(open_source(Path(path)))
    return source, detect(source.specs, family=options.family)


def _check_output(target: Path, plan: Plan, options: Options) -> None:
    """Refuse early what the sink would refuse late, and an output that is also an input."""
    folder = plan.sources[0].container == "folder"
    if not folder and target.suffix != ".safetensors":
        raise RequestError(f"{target}: outputs are safetensors files (expected a name that ends in .safetensors)")
    try:
        there = target.stat()
    except OSError:
        return
    if options.overwrite:
        return
    for source in plan.sources:
        for file in source.files:
            if (file.identity.device, file.identity.inode) == (there.st_dev, there.st_ino):
                raise OutputExists(
                    f"is the input {file.path}",
                    path=target,
                    advice="choose another name, or --overwrite to replace it when done",
                )
    raise OutputExists("exists already", path=target, advice="pass --overwrite, or choose another name")


def _execute(
    plan: Plan, metadata: Mapping[str, str], target: Path, options: Options, started: float, label: str
) -> Report:
    from sdmerge.run import run

    shown = options.progress or (lambda _label, _total: nullcontext(lambda _done: None))
    with create_sink(target, plan.specs, metadata, like=plan.sources[0], overwrite=options.overwrite) as sink:
        with shown(label, plan.cost) as advance:
            findings = run(plan, sink, options, advance)
        for source in plan.sources:
            source.verify()
    return _report(plan, target, started, findings.nonfinite, findings.overflowed)


def _report(
    plan: Plan,
    target: Path,
    started: float,
    nonfinite: Mapping[str, int] | None = None,
    overflowed: Mapping[str, int] | None = None,
) -> Report:
    counts: dict[str, int] = {}
    for step in plan.steps:
        counts[step.why] = counts.get(step.why, 0) + 1
    return Report(
        output=target,
        written=nonfinite is not None,
        nbytes=sum(spec.nbytes for spec in plan.specs.values()),
        tensors=len(plan.specs),
        counts=counts,
        family=plan.family,
        notes=plan.notes,
        seconds=time.perf_counter() - started,
        nonfinite=dict(nonfinite or {}),
        overflowed=dict(overflowed or {}),
    )
