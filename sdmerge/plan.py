"""From models and a method to a `Plan`: every tensor of the output decided, from headers alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sdmerge import policy
from sdmerge.step import Plan, Read, Step, ordered

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.method import Method
    from sdmerge.options import Options


def plan_merge(
    method: Method,
    values: Mapping[str, Any],
    models: Sequence[tuple[TensorSource, Detection]],
    vae: tuple[TensorSource, Detection] | None,
    options: Options,
) -> Plan:
    """Decide about every tensor of a merge.

    Args:
        method: what to do with tensors that all models have.
        values: its parameters, checked and complete.
        models: A first.
        vae: a file whose VAE replaces A's.
        options: the policies.

    Raises:
        SdmergeError: the models do not fit together; nothing has been written.
    """
    notes = policy.Notes()
    views = [policy.view(policy.LABELS[i], source, seen, options, notes) for i, (source, seen) in enumerate(models)]
    policy.check_together(views, options, notes)
    compute = partial(method.function, **values)
    steps: dict[str, Step] = {}
    first = views[0]
    for name in first.tensors:
        reads = [one.tensors.get(name) for one in views]
        step = policy.merge_step(name, reads, compute, method, options, notes)
        if step is not None:
            steps[name] = step
    _note_extras(views, notes)
    sources = [source for source, _ in models]
    if vae is not None:
        source, seen = vae
        steps.update(
            policy.vae_steps(first.tensors, policy.view("VAE", source, seen, options, notes), first, options, notes)
        )
        sources.append(source)
    return _finish(steps, tuple(sources), notes, models[0][1], options)


def plan_copy(source: TensorSource, seen: Detection, options: Options) -> Plan:
    """Decide about every tensor of a conversion: all are kept under their names.

    Factors of fp8 weights stay beside them as they are, unless another type is asked for: then they are multiplied in.
    """
    notes = policy.Notes()
    if options.output_type is None:
        tensors: Mapping[str, Read] = {name: Read(source, name) for name in source.specs}
        if options.ema != "keep":
            tensors = policy.view("A", source, seen, options, notes).tensors
    else:
        tensors = policy.view("A", source, seen, options, notes).tensors
    steps = {name: policy.copy_step(name, read, options, notes) for name, read in tensors.items()}
    return _finish(steps, (source,), notes, seen, options)


def _note_extras(views: Sequence[policy.View], notes: policy.Notes) -> None:
    known = views[0].tensors
    for other in views[1:]:
        for name in other.tensors:
            if name not in known and policy.reports_extra(name):
                notes.add(f"only {other.label} has it, left out", name)


def _finish(
    steps: dict[str, Step], sources: tuple[TensorSource, ...], notes: policy.Notes, seen: Detection, options: Options
) -> Plan:
    reported = tuple(f"{source.path.name}: {note}" for source in sources for note in source.notes)
    return Plan(
        steps=ordered(list(steps.values()), sources),
        names=tuple(steps),
        sources=sources,
        notes=reported + notes.lines(),
        family=options.family or seen.family,
        variant=seen.variant,
    )
