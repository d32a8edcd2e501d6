"""Carry out recipes and conversions: open, plan, check, run, report. Every command that writes a model comes here."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdformats.errors import OutputExists
from sdformats.files import create_sink, open_source
from sdformats.layout import detect
from sdformats.torch_sink import SUFFIXES as TORCH_SUFFIXES
from sdmerge import hashing, provenance
from sdmerge.errors import MismatchError, RequestError
from sdmerge.plan import plan_copy, plan_merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sdformats.adapters.adapter import Adapter
    from sdformats.hypernetwork import Hypernetwork
    from sdformats.layout import Detection
    from sdformats.tensor import Spec, TensorSink, TensorSource
    from sdmerge.lora.words import Word
    from sdmerge.options import Options
    from sdmerge.recipe import Recipe
    from sdmerge.step import Plan

    Opened = tuple[TensorSource, Detection]
    Adapters = Mapping[str, tuple[TensorSource, Adapter | Hypernetwork]]
    MakeSink = Callable[[Path, Mapping[str, Spec], Mapping[str, str]], TensorSink]

FILE_ENDINGS = (".safetensors", *TORCH_SUFFIXES)
"""How files of models may be called that are written."""


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


def execute(recipes: Sequence[Recipe], targets: Sequence[Path], options: Options) -> list[Report]:
    """Carry out recipes over the same inputs, which are read once, and write one output for each.

    Args:
        recipes: at least one; all name the same inputs.
        targets: where to write, one for each.
        options: for all of them.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    if len(set(targets)) < len(targets):
        raise RequestError(f"{targets[0]}: two outputs would have one name")
    with ExitStack() as stack:
        plans, labels, adapters = planned(stack, recipes, options)
        for plan, target in zip(plans, targets, strict=True):
            check_output(target, plan, options)
        words = [_words(adapters, target, options) for target in targets]
        plans = [
            replace(plan, notes=(*plan.notes, *(one.note for one in its)))
            for plan, its in zip(plans, words, strict=True)
        ]
        if options.dry_run:
            return [report_of(plan, target, started) for plan, target in zip(plans, targets, strict=True)]
        inputs = provenance.describe_inputs(plans[0].sources, labels, options)
        metadata = [
            provenance.merge_metadata(plan, recipe, inputs, options, target)
            for plan, recipe, target in zip(plans, recipes, targets, strict=True)
        ]
        reports = write_plans(plans, metadata, targets, options, started, "merging")
        if any(words):
            from sdmerge.lora.words import write_words

            write_words([word for its in words for word in its], options)
        return reports


def _words(adapters: Adapters, target: Path, options: Options) -> list[Word]:
    """Return the embeddings that adapters carry, which go beside an output."""
    if not any(getattr(adapter, "embeddings", None) for _, adapter in adapters.values()):
        return []
    from sdmerge.lora.words import words_of

    return words_of(adapters.values(), target, options)


def planned(stack: ExitStack, recipes: Sequence[Recipe], options: Options) -> tuple[list[Plan], list[str], Adapters]:
    """Open what recipes name, for as long as `stack` lives, and decide about every tensor.

    Args:
        recipes: at least one; all name the same inputs.

    Returns:
        A plan for each, what the plans' sources are called in the recipes, and the open adapters.

    Raises:
        See `execute`.
    """
    first = recipes[0]
    with no_collection():
        opened = {name: open_model(stack, first.inputs[name].path, options) for name in first.ids}
        vae = open_model(stack, Path(options.vae), options) if options.vae is not None else None
        adapters = {name: open_adapter_of(stack, first.inputs[name].path) for name in first.adapters}
        plans = [plan_merge(recipe, opened, vae, options, adapters) for recipe in recipes]
    check_sha256(first, {name: source for name, (source, _) in (opened | adapters).items()})
    return plans, [*first.ids, *(["VAE"] if vae else []), *first.adapters], adapters


def copy_model(source: TensorSource, seen: Detection, target: Path, options: Options, started: float) -> Report:
    """Write an open model's tensors under their names. Errors as `execute`.

    Args:
        source: the model.
        seen: what it is.
        target: where to write.
        options: what of it, and in which type.
        started: when the command began, as `time.perf_counter` told it.
    """
    with no_collection():
        plan = plan_copy(source, seen, options)
    check_output(target, plan, options, () if source.container == "folder" else FILE_ENDINGS)
    if options.dry_run:
        return report_of(plan, target, started)
    metadata = provenance.convert_metadata(source)
    return write_plans([plan], [metadata], [target], options, started, "converting")[0]


def check_sha256(recipe: Recipe, opened: Mapping[str, TensorSource]) -> None:
    """Refuse inputs that are not what the recipe says.

    Raises:
        MismatchError: a file's sha256 is another.
        RequestError: a sha256 for a folder.
    """
    for name in (*recipe.ids, *recipe.adapters):
        expected = recipe.inputs[name].sha256
        if expected is None:
            continue
        source = opened[name]
        if len(source.files) != 1:
            raise RequestError(f"{source.path}: has {len(source.files)} files and no sha256 of its own; leave it out")
        found = hashing.sha256(source.files[0])
        if found != expected:
            raise MismatchError(f"{source.path}: its sha256 is {found} (the recipe expects {expected})")


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking all of torch because some thousand headers were read (0.1 s each time)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def open_model(stack: ExitStack, path: Path, options: Options) -> Opened:
    """Open a model for as long as `stack` lives, and see what it is."""
    source = stack.enter_context(open_source(path))
    seen = detect(source.specs, metadata=source.metadata, family=options.family, kind=options.kind)
    return source, seen


def check_decided(seen: Detection, path: Path) -> None:
    """Refuse a file that could be several things.

    Raises:
        RequestError: it could.
    """
    if len(seen.readings) > 1:
        raise RequestError(f"{path}: {seen.warnings[0]}")


def open_adapter_of(stack: ExitStack, path: Path) -> tuple[TensorSource, Adapter | Hypernetwork]:
    """Open an adapter, or a hypernetwork, for as long as `stack` lives."""
    from sdformats.adapters import open_adapter
    from sdformats.hypernetwork import read_hypernetwork

    source = stack.enter_context(open_source(path))
    if detect(source.specs, metadata=source.metadata).kind == "hypernetwork":
        return source, read_hypernetwork(source)
    return source, open_adapter(source)[0]


def check_output(target: Path, plan: Plan, options: Options, endings: tuple[str, ...] | None = None) -> None:
    """Refuse early what the sink would refuse late, and an output that is also an input.

    Args:
        target: where to write.
        plan: what.
        options: whether something may be replaced.
        endings: how the name of a file may end; empty: the output is a folder. None: as the first input is.

    Raises:
        RequestError: the name is not one for what is written.
        OutputExists: there is something of that name.
    """
    if plan.small is not None:
        from sdmerge.writing import check_target

        check_target(target, plan.small)
    else:
        folder = plan.sources[0].container == "folder"
        _check_ending(target, (() if folder else (".safetensors",)) if endings is None else endings)
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
    raise OutputExists.at(target)


def _check_ending(target: Path, endings: tuple[str, ...]) -> None:
    suffix = target.suffix.lower()
    if endings and suffix not in endings:
        raise RequestError(f"{target}: is no name for this output (expected one that ends in {' or '.join(endings)})")
    if not endings and suffix in FILE_ENDINGS:
        raise RequestError(f"{target}: the output is a folder (expected a name without {suffix})")


def shown(options: Options, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Return a context that yields what takes bytes done: the user's progress, or nothing."""
    if options.progress is None:
        return nullcontext(lambda _done: None)
    return options.progress(label, total)


def write_plans(
    plans: Sequence[Plan],
    metadata: Sequence[Mapping[str, str]],
    targets: Sequence[Path],
    options: Options,
    started: float,
    label: str,
    make_sink: MakeSink | None = None,
) -> list[Report]:
    """Run plans over the same inputs, and write one output for each.

    Args:
        started: when the command began, as `time.perf_counter` told it.
        label: what the progress is called.
        make_sink: begins an output; None: a folder where the first input is one, else one file.
    """
    from sdmerge.run import run
    from sdmerge.writing import sink_of_small

    with ExitStack() as stack:
        outputs: list[tuple[Plan, TensorSink]] = []
        for plan, texts, target in zip(plans, metadata, targets, strict=True):
            if make_sink is None and plan.small is not None:
                sink = sink_of_small(target, plan.specs, texts, plan.small, overwrite=options.overwrite)
            elif make_sink is None:
                sink = create_sink(target, plan.specs, texts, like=plan.sources[0], overwrite=options.overwrite)
            else:
                sink = make_sink(target, plan.specs, texts)
            outputs.append((plan, stack.enter_context(sink)))
        with shown(options, label, sum(plan.cost for plan in plans)) as advance:
            findings = run(outputs, options, advance)
        for source in plans[0].sources:
            source.verify()
    return [
        report_of(plan, target, started, findings.nonfinite, findings.overflowed)
        for plan, target in zip(plans, targets, strict=True)
    ]


def report_of(
    plan: Plan,
    target: Path,
    started: float,
    nonfinite: Mapping[str, int] | None = None,
    overflowed: Mapping[str, int] | None = None,
) -> Report:
    """Say what was done; without `nonfinite`, what would be."""
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
