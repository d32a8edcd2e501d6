"""The options that several commands have, those that every command with an output has, and how its report is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from sdmerge.cli import screen
from sdmerge.options import OUTPUT_TYPES, Ema, Missing, OptionFields, Overflow, Prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdmerge.api import Report

F = TypeVar("F", bound="Callable[..., Any]")


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return one decorator that adds several options; help texts show them in this order."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)
THREADS = click.option("--threads", type=click.IntRange(1, 256), help="Default: the processor's cores, 8 at most.")
FAMILY = click.option("--family", help="What the models are, where their structure does not tell.")
TOKEN = click.option(
    "--token", metavar="WORD", help="What an embedding's word is called. Default: as it was, or after the file."
)
FOR = click.option(
    "--for",
    "for_family",
    metavar="FAMILY",
    help="Refuse an embedding that is for another family: sd1, sd2, sdxl, sd3, flux.",
)
OUTPUT = click.option("-o", "--output", required=True, type=click.Path(), help="Where to write.")
ADAPTER_CONFIG = click.option(
    "--adapter-config",
    type=click.Path(),
    metavar="FILE",
    help="PEFT's adapter_config.json, where it is not beside the file.",
)
TOKENIZER = click.option(
    "--tokenizer", type=click.Path(), metavar="DIR", help="A folder with CLIP's vocabulary, for a single file."
)
MODEL_CONFIG = click.option(
    "--model-config",
    type=click.Path(),
    metavar="DIR",
    help="A diffusers folder that describes a file of unusual widths.",
)
QUIET = click.option("--quiet", is_flag=True, help="Say nothing but results, warnings and errors.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
_SAFETENSORS = click.option("-o", "--output", required=True, type=click.Path(), help="The .safetensors file to write.")
_FILE_OR_FOLDER = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="The .safetensors file to write; a folder where the model is one.",
)
_MISSING = click.option(
    "--missing",
    type=click.Choice(get_args(Missing)),
    default="keep",
    show_default=True,
    help="A tensor of A that another model lacks: keep A's value, leave it out, or stop.",
)
_HASH = click.option(
    "--hash", "hash_inputs", is_flag=True, help="Put the inputs' sha256 into the metadata (reads them once more)."
)
_VAE = click.option("--vae", type=click.Path(), help="Take the VAE from this file.")

_EMA = click.option(
    "--ema",
    type=click.Choice(get_args(Ema)),
    default="keep",
    show_default=True,
    help="model_ema.*: keep A's, leave them out, or use them in place of the plain weights.",
)


def _writing(kept: str, *more: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return what every command that writes has.

    Args:
        kept: whose type it takes where none is asked for.
        more: what some have besides.
    """
    return together(
        click.option("--dtype", type=click.Choice(list(OUTPUT_TYPES)), default="keep", show_default=True,
                     help=f"Type of the floating tensors; keep takes {kept}."),
        DEVICE,
        THREADS,
        click.option("--overwrite", is_flag=True, help="Replace an existing output, when the new one is complete."),
        click.option("--dry-run", is_flag=True, help="Decide everything, write nothing."),
        *more,
        click.option("--overflow", type=click.Choice(get_args(Overflow)), default="refuse", show_default=True,
                     help="Values too large for the output type."),
        click.option("--allow-nonfinite", is_flag=True, help="Go on where an input holds NaN or infinity."),
        FAMILY,
        QUIET,
        AS_JSON,
    )  # fmt: skip


output_options = _writing("A's", _EMA)
"""What every command has that writes a model."""

extraction_options = _writing("fp16")
"""What an extraction has, which makes its factors itself."""

combination_options = _writing("the first adapter's")
"""What makes an adapter of others has."""

folder_options = together(
    click.option("--shard-size", metavar="SIZE", help="For diffusers folders: bytes in a file, at most, as 5GB."),
    click.option("--prediction", type=click.Choice(get_args(Prediction)),
                 help="For diffusers folders: what the model predicts, where nothing in it tells."),
    click.option("--tokenizer", type=click.Path(), metavar="DIR",
                 help="For diffusers folders: take tokenizers from here, a diffusers folder or a tokenizer's own."),
)  # fmt: skip
"""What every command has that may write a diffusers folder."""

merge_options = together(_SAFETENSORS, _MISSING, _HASH, output_options)
"""What every merge command has."""

bake_options = together(_FILE_OR_FOLDER, _HASH, output_options)
"""What baking has: an output, and whether inputs are hashed."""

run_options = together(_MISSING, _HASH, _VAE, output_options)
"""What a recipe can be run with: it may say itself where to write."""


def limits(what: str, size: str, *, default: str = "") -> Callable[[F], F]:
    """Return what adds the ways to say how small factors are to be.

    Args:
        what: what has a rank of its own: layer, module, matrix.
        size: an example of a file's size.
        default: the rank where none is asked for.
    """
    return together(
        click.option("--rank", type=click.IntRange(1), metavar="R",
                     help=f"The rank of every {what}.{default and f' Default: {default}.'}"),
        click.option("--size", metavar=size, help="The size of the file: ranks are chosen for the least error in it."),
        click.option("--energy", type=float, metavar="E", help=f"Keep this share of each {what}'s squared singular values."),
        click.option("--error", type=float, metavar="E", help=f"Keep each {what}'s relative error below this."),
    )  # fmt: skip


def api_options(given: dict[str, Any]) -> OptionFields:
    """Turn a command's parsed options into the python API's keyword arguments."""
    screen.set_quiet(given["quiet"])
    fields: OptionFields = {
        name: given[name]
        for name in OptionFields.__annotations__
        if name in given  # type: ignore[assignment]
    }
    fields["progress"] = screen.progress
    return fields


def show(reports: Sequence[Report], *, as_json: bool) -> None:
    """Tell what was done and decided: notes first, the result last. Several outputs make a list in JSON."""
    if as_json:
        found = [_as_data(report) for report in reports]
        screen.json(found[0] if len(found) == 1 else found)
        return
    for i, report in enumerate(reports):
        _say(report, notes=report.notes if i == 0 or report.notes != reports[0].notes else ())


def _as_data(report: Report) -> dict[str, Any]:
    return {
        "output": str(report.output),
        "written": report.written,
        "bytes": report.nbytes,
        "tensors": report.tensors,
        "counts": dict(report.counts),
        "family": report.family,
        "notes": list(report.notes),
        "nonfinite": dict(report.nonfinite),
        "overflowed": dict(report.overflowed),
        "seconds": round(report.seconds, 3),
    }


def _say(report: Report, notes: Sequence[str]) -> None:
    for note in notes:
        screen.say(f"note: {note}")
    for what, found in (("NaN or infinity in", report.nonfinite), ("too large in", report.overflowed)):
        for name, count in found.items():
            screen.warn(f"{count:,} elements {what} {name}")
    counts = ", ".join(f"{count:,} {why}" for why, count in report.counts.items())
    size = screen.human(report.nbytes)
    if report.written:
        screen.say(f"{report.output}: {report.tensors:,} tensors ({counts}), {size} in {report.seconds:.1f} s")
    else:
        screen.out(f"{report.output}: would hold {report.tensors:,} tensors ({counts}), {size}; nothing was written")
