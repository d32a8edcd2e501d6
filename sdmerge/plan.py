"""From a recipe and open models to a `Plan`: every tensor of the output decided, from headers alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdmerge import policy
from sdmerge.errors import FamilyError, MismatchError
from sdmerge.expression import Call, Leaf
from sdmerge.recipe import Model, leaves, weights_in
from sdmerge.recipe import models as models_of
from sdmerge.respelling import view_alike
from sdmerge.small_merge import merged_small
from sdmerge.step import Plan, Read, Step, ordered

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sdformats.adapters.adapter import Adapter
    from sdformats.hypernetwork import Hypernetwork
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdmerge.blocks import Table
    from sdmerge.expression import Expression
    from sdmerge.lora.contributions import Contribution, Contributions
    from sdmerge.options import Options
    from sdmerge.recipe import Merge, Recipe

    Opened = tuple[TensorSource, Detection]
    OpenedAdapter = tuple[TensorSource, Adapter | Hypernetwork]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of one of the models, among a step's reads."""

    model: str
    name: str


_JOINT = re.compile(r"(?:joint_blocks|(?<!single_)transformer_blocks)\.(\d{1,3})\.")


def plan_merge(
    recipe: Recipe,
    models: Mapping[str, Opened],
    vae: Opened | None,
    options: Options,
    adapters: Mapping[str, OpenedAdapter] | None = None,
) -> Plan:
    """Decide about every tensor of a merge.

    Args:
        recipe: what to do with tensors that all models have.
        models: the recipe's models, by name.
        adapters: the recipe's adapters, by name.
        vae: a file whose VAE replaces A's.
        options: the policies.

    Raises:
        SdmergeError: the models do not fit together; nothing has been written.
    """
    notes = policy.Notes()
    small = merged_small(models, recipe)
    spelling = models[recipe.ids[0]][1].spelling
    views = {name: view_alike(name, *models[name], spelling, options, notes) for name in recipe.ids}
    in_order = tuple(views.values())
    policy.check_together(in_order, options, notes)
    first = in_order[0]
    blocks = _table(recipe, first, options, notes)
    baking = _baking(recipe, views, blocks, adapters or {}, options, notes)
    build = _Builder(views, baking, blocks, options, notes)
    steps: dict[str, Step] = {}
    for name in first.tensors:
        step = build.step(name, recipe.merge)
        if step is not None:
            steps[name] = step
    _note_extras(in_order, notes)
    sources = [view.source for view in in_order]
    if vae is not None:
        source, seen = vae
        given = view_alike("VAE", source, seen, spelling, options, notes)
        steps.update(policy.vae_steps(first.tensors, given, first, options, notes))
        sources.append(given.source)
    sources += [source for source, _ in (adapters or {}).values()]
    plan = _finish(steps, tuple(sources), notes, first.detection, options)
    return replace(plan, small=small)


def _baking(
    recipe: Recipe,
    views: Mapping[str, policy.View],
    blocks: Table | None,
    adapters: Mapping[str, OpenedAdapter],
    options: Options,
    notes: policy.Notes,
) -> Mapping[Model, Contributions]:
    """Return what is added to each tensor of each model that has adapters."""
    found: dict[Model, Contributions] = {}
    for model in models_of(recipe.merge):
        if not model.adapters or model in found:
            continue
        from sdformats.hypernetwork import Hypernetwork
        from sdmerge.hypernetworks import check_plain
        from sdmerge.lora.contributions import contributions, strength_of

        view = views[model.id]
        added = [(adapters[one.id][1], strength_of(one.strength, blocks)) for one in model.adapters]
        found[model], counts = contributions(view.source, options.family or view.detection.family, added)
        for one, (adapter, _) in zip(model.adapters, added, strict=True):
            if isinstance(adapter, Hypernetwork):
                check_plain(view)
                what = f"a linear hypernetwork of {len(adapter.networks)} widths folded"
            else:
                count = counts[id(adapter)]
                of_all = "" if count == len(adapter.modules) else f" of {len(adapter.modules):,}"
                what = f"{count:,}{of_all} modules baked"
            notes.add(f"{one.id}: {what} into {model.id}")
            for note in adapter.notes:
                notes.add(f"{one.id}: {note}")
    return found


def plan_copy(source: TensorSource, seen: Detection, options: Options, notes: policy.Notes | None = None) -> Plan:
    """Decide about every tensor of a conversion: all are kept under their names. `notes` are those to add to.

    Factors of fp8 weights stay beside them as they are, unless another type is asked for: then they are multiplied in.
    """
    notes = notes or policy.Notes()
    label = source.path.name
    tensors: Mapping[str, Read]
    if options.output_type is None:
        tensors = {
            name: Read(source, key) for name, key in policy.averaged(label, source.specs, options, notes).items()
        }
    else:
        tensors = policy.view(label, source, seen, options, notes).tensors
    steps = {name: policy.copy_step(name, read, options, notes) for name, read in tensors.items()}
    return _finish(steps, (source,), notes, seen, options)


@dataclass(frozen=True)
class _Builder:
    """Turns a recipe into one tensor's expression after the other."""

    views: Mapping[str, policy.View]
    baking: Mapping[Model, Contributions]
    table: Table | None
    options: Options
    notes: policy.Notes

    def step(self, name: str, merge: Model | Merge) -> Step | None:
        """Decide about one of A's tensors: merge, copy, or leave out (None)."""
        first = next(iter(self.views.values())).tensors[name]
        if kept := policy.kept_as_is(name, first, self.options, self.notes):
            return kept
        reads: dict[object, Read] = {}
        made = self._expression(name, merge, reads)
        if made is None:
            return None
        if isinstance(made, Leaf):
            why = "copy" if isinstance(merge, Model) else "keep"
            return policy.copy_step(name, first, self.options, self.notes, why=why)
        models = {one.model: read for one, read in reads.items() if isinstance(one, _Tensor) and one.name == name}
        step = policy.merge_step(name, tuple(models), tuple(models.values()), made, self.options, self.notes)
        if len(models) == len(reads):
            return replace(step, why="bake") if isinstance(merge, Model) else step
        if step.compute is not made:
            raise MismatchError(
                f"{name!r}: has different widths in the models, and cannot be computed from more than these"
            )
        return replace(
            step, reads=tuple(reads.values()), whole=True, why="bake" if isinstance(merge, Model) else step.why
        )

    def _expression(self, name: str, node: Model | Merge, reads: dict[object, Read]) -> Expression | None:
        """Return what `node` is for one tensor; None where it has no such tensor, as its first model decides."""
        if isinstance(node, Model):
            read = self.views[node.id].tensors.get(name)
            if read is None:
                return None
            one = _Tensor(node.id, name)
            reads.setdefault(one, read)
            index = list(reads).index(one)
            added = self.baking.get(node, {}).get(name)
            return Leaf(index) if not added else _baked(index, added, reads)
        before = dict(reads)
        first = self._expression(name, node.operands[0], reads)
        if first is None:
            return None
        after_first = dict(reads)
        others = [self._expression(name, operand, reads) for operand in node.operands[1:]]
        absent = [str(operand) for operand, one in zip(node.operands[1:], others, strict=True) if one is None]
        if not absent:
            operands = (first, *(one for one in others if one is not None))
            return self._call(name, node, operands, reads)
        mine = self.views[next(leaves(node))].tensors[name]
        kept = policy.keeps_missing(name, mine, " and ".join(absent), self.options, self.notes)
        reads.clear()  # what was read for nothing
        reads.update(after_first if kept else before)
        return first if kept else None

    def _call(
        self, name: str, node: Merge, operands: tuple[Expression, ...], reads: dict[object, Read]
    ) -> Expression | None:
        """Return the call of a method, with the other tensors that it must see, or what it leaves as it is."""
        beside: dict[str, tuple[Expression, ...]] = {}
        if node.method.siblings is not None:
            named = node.method.siblings(name, self.views[next(leaves(node))].tensors)
            if named is None:
                return operands[0]
            for other in named:
                beside[other] = tuple(self._sibling(other, operand, reads) for operand in node.operands)
        family = self.options.family or next(iter(self.views.values())).detection.family
        return Call(node.method, node.at(name, self.table), name, operands, node.based, beside, family)

    def _sibling(self, name: str, node: Model | Merge, reads: dict[object, Read]) -> Expression:
        found = self._expression(name, node, reads)
        if found is None:
            raise MismatchError(
                f"{name!r}: is missing in {node}, and without it the tensors beside it cannot be merged"
            )
        for one, read in reads.items():
            if isinstance(one, _Tensor) and one.name == name and read.spec.dtype not in policy.COMPUTABLE:
                raise MismatchError(f"{read}: is {read.spec}, a type that cannot be merged")
        return found


def _baked(index: int, added: Sequence[Contribution], reads: dict[object, Read]) -> Expression:
    """Return the expression of a tensor with adapters, and add their tensors to the reads."""
    from sdmerge.lora.bake import Baked

    stored = tuple(dict.fromkeys(one for part in added for ref in part.refs for one in ref.stored()))
    for one in stored:
        reads.setdefault(one, Read(one.source, one.key))
    places = list(reads)
    return Baked(index, tuple(added), tuple((one, places.index(one)) for one in stored))


def _table(recipe: Recipe, first: policy.View, options: Options, notes: policy.Notes) -> Table | None:
    """Return the family's blocks where the recipe needs them.

    Raises:
        FamilyError: it does, and the family is not known.
        RequestError: it names blocks that the family does not have.
    """
    if not recipe.differs:
        return None
    from sdmerge.blocks import table

    family = options.family or first.detection.family
    if family is None:
        raise FamilyError("block weights need to know the family, which the first model does not show; give --family")
    found = table(family, _depth(first.tensors))
    notes.take(recipe.check_blocks(found))
    for weights in weights_in(recipe.merge):
        for rule in weights.idle(first.tensors, found):
            notes.add(f"the rule {rule} fits no tensor")
    return found


def _depth(names: Iterable[str]) -> int | None:
    """Return how many joint blocks the network has; None where it has none."""
    found = [int(match[1]) for name in names if (match := _JOINT.search(name))]
    return max(found) + 1 if found else None


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
