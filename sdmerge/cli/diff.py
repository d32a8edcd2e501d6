"""``sdmerge diff``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdmerge.cli import options, screen

if TYPE_CHECKING:
    from sdmerge.comparison import BlockDifference, Difference, TensorDifference
    from sdmerge.measure import Measures

_STATUSES = (
    ("only_a", "only A has"),
    ("only_b", "only B has"),
    ("shape", "of another shape"),
    ("type", "of types that cannot be compared"),
)


@click.command("diff")
@click.argument("a", type=click.Path(), metavar="A")
@click.argument("b", type=click.Path(), metavar="B")
@click.option("--plot", type=click.Path(), metavar="PNG", help="Draw a heat map over the blocks into this file.")
@click.option("--overwrite", is_flag=True, help="Replace an existing heat map.")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="How many tensors to list.")
@click.option("--ema", is_flag=True, help="Compare model_ema.* too.")
@options.THREADS
@options.FAMILY
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the models differ.")
@options.QUIET
@click.option("--json", "as_json", is_flag=True, help="Print everything, each tensor too, as JSON.")
def diff(
    a: str,
    b: str,
    plot: str | None,
    overwrite: bool,
    top: int,
    ema: bool,
    threads: int | None,
    family: str | None,
    exit_code: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare two models, by block and by tensor."""
    from sdmerge import comparison, heatmap

    screen.set_quiet(quiet)
    picture = Path(plot) if plot is not None else None
    if picture is not None:
        heatmap.check(picture, overwrite=overwrite)
    found = comparison.diff(a, b, ema=ema, threads=threads, family=family, progress=screen.progress)
    if picture is not None:
        heatmap.save(found, picture, overwrite=overwrite)
    if as_json:
        screen.json(found.as_dict())
    else:
        _show(found, top)
        if picture is not None:
            screen.say(f"{picture}: heat map written")
    return 1 if exit_code and not found.identical else 0


def _show(found: Difference, top: int) -> None:
    for note in found.notes:
        screen.say(f"note: {note}")
    columns = ("part", "block", "tensors", "differing", "elements", "distance", "cosine")
    rows = [_block_row(one) for one in (*found.blocks, found.total)]
    screen.table("by block", columns, rows, right=columns[2:])
    _show_tensors(found.most_changed(top))
    for status, said in _STATUSES:
        if listed := found.with_status(status):  # type: ignore[arg-type]
            _show_names(f"{len(listed):,} tensors {said}", listed, top)
    screen.out(_verdict(found))


def _block_row(one: BlockDifference) -> tuple[str, ...]:
    there = sum(one.tensors.values())
    unlike = there - one.tensors["identical"]
    return (one.component, one.block, f"{there:,}", f"{unlike:,}", _share(one.measures), *_numbers(one.measures))


def _show_tensors(most: tuple[TensorDifference, ...]) -> None:
    if not most:
        return
    columns = ("tensor", "block", "elements", "distance", "cosine")
    rows = [(one.name, one.block, _share(one.measures), *_numbers(one.measures)) for one in most if one.measures]
    screen.table("most changed", columns, rows, right=columns[2:])


def _show_names(title: str, listed: tuple[TensorDifference, ...], top: int) -> None:
    rows = [(one.name, one.block, str(one.a or "-"), str(one.b or "-")) for one in listed[:top]]
    if len(listed) > top:
        rows.append((f"... and {len(listed) - top:,} more (--top, --json)", "", "", ""))
    screen.table(title, ("tensor", "block", "A", "B"), rows)


def _share(measures: Measures) -> str:
    """Write how many elements changed, such that 0 % and 100 % mean none and all."""
    if not measures.elements:
        return "-"
    share = 100 * measures.changed / measures.elements
    if measures.changed and share < 0.1:
        return "<0.1 %"
    return ">99.9 %" if share > 99.9 and measures.changed < measures.elements else f"{share:.3g} %"


def _numbers(measures: Measures) -> tuple[str, str]:
    distance, cosine = measures.distance, measures.cosine
    return "-" if distance is None else f"{distance:.3g}", "-" if cosine is None else f"{cosine:.6f}"


def _verdict(found: Difference) -> str:
    total, tensors = found.total.measures, found.total.tensors
    if found.identical:
        return f"identical: {sum(tensors.values()):,} tensors, {total.elements:,} elements"
    parts = [f"{tensors['changed']:,} of {sum(tensors.values()):,} tensors changed"]
    parts += [f"{tensors[status]:,} {said}" for status, said in _STATUSES if tensors[status]]  # type: ignore[index]
    if types := sum(one.types_differ for one in found.tensors):
        parts.append(f"{types:,} of another type")
    parts.append(f"{total.changed:,} of {total.elements:,} elements")
    if total.nonfinite:
        parts.append(f"{total.nonfinite:,} of them NaN or infinite and left out of the distance")
    return "different: " + ", ".join(parts)
