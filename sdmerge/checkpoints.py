"""Convert whole models and their parts: between a single file and a diffusers folder, in both directions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from sdformats.configs import INDEX, SCHEDULER, Schedule, as_text, folder_configs, known
from sdformats.configs.tokenizers import find_tokenizers
from sdformats.files import create_sink
from sdformats.folder_sink import FolderSink, component_place, side_files
from sdformats.keymap import EXTRAS
from sdformats.layout import DIFFUSERS, SINGLE_FILE
from sdformats.renamed import Renamed
from sdformats.shards import Shards
from sdformats.views import Stored
from sdmerge import policy
from sdmerge.errors import FamilyError, RequestError, nearest
from sdmerge.execute import FILE_ENDINGS, check_output, no_collection, report_of, write_plans
from sdmerge.plan import plan_copy
from sdmerge.prediction import marked, schedule_of
from sdmerge.provenance import convert_metadata, respelled_metadata, said_once
from sdmerge.respelling import turned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sdformats.configs import Config, Written
    from sdformats.tensor import Spec, TensorSink, TensorSource
    from sdformats.views import Ref
    from sdmerge.conversion import Conversion, Given
    from sdmerge.execute import Report
    from sdmerge.options import Options
    from sdmerge.policy import Notes
    from sdmerge.step import Plan

SPELLINGS = (SINGLE_FILE, DIFFUSERS)


@dataclass
class Output:
    """What is written, beside the tensors.

    Attributes:
        folder: whether it is a diffusers folder.
        metadata: texts in the headers of the files of tensors.
        texts: other files of a folder, by name.
        copies: files to copy into it, by the names they get.
        shard: how many bytes a shard of it may have; None: any number.
    """

    folder: bool
    metadata: dict[str, str]
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    shard: int | None = None

    def sink(
        self,
        target: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        *,
        like: TensorSource,
        overwrite: bool,
    ) -> TensorSink:
        """Begin it."""
        if not self.folder:
            return create_sink(target, specs, metadata, like=like, overwrite=overwrite)
        shards = None if self.shard is None else Shards(specs, self.shard)
        texts = self.texts if shards is None else self.texts | shards.texts
        place = component_place if shards is None else shards
        return FolderSink(
            target, specs, metadata, None, place=place, copies=self.copies, texts=texts, overwrite=overwrite
        )


def convert_model(given: Given, target: Path, conversion: Conversion, options: Options) -> Report:
    """Write a model, or a part of one, in either spelling.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written, or is not what its names say.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    source, seen = given.source, given.seen
    if conversion.to not in (None, *SPELLINGS):
        hint = nearest(conversion.to, SPELLINGS)
        raise RequestError(f"{conversion.to!r} is no layout of models (expected {' or '.join(SPELLINGS)}){hint}")
    if conversion.to is None and source.container == "folder" and target.suffix.lower() in FILE_ENDINGS:
        conversion = replace(conversion, to=SINGLE_FILE)  # its name says that it is one file
    notes = policy.Notes()
    with no_collection():
        keys = policy.averaged(source.path.name, source.specs, options, notes)
        tensors: dict[str, Ref] = {name: Stored(source, key) for name, key in keys.items()}
        made = turned(tensors, source, seen, conversion, options, notes)
        tensors = made.tensors
        if conversion.to == DIFFUSERS or (conversion.to is None and source.container == "folder"):
            output = _folder(given, tensors, conversion, options, notes)
            output.metadata |= said_once(made.twins)
        else:
            tensors, output = _file(given, tensors, conversion)
        plan = plan_copy(Renamed(tensors, (source,)), seen, replace(options, ema="keep"), notes)
    return write_model(plan, output, target, options, given.started)


def write_model(plan: Plan, output: Output, target: Path, options: Options, started: float) -> Report:
    """Write what was planned; in a dry run, say what would be. Errors as `convert_model`."""
    check_output(target, plan, options, () if output.folder else FILE_ENDINGS)
    if options.dry_run:
        return report_of(plan, target, started)
    make_sink = partial(output.sink, like=plan.sources[0], overwrite=options.overwrite)
    return write_plans([plan], [output.metadata], [target], options, started, "converting", make_sink)[0]


def _file(given: Given, tensors: dict[str, Ref], conversion: Conversion) -> tuple[dict[str, Ref], Output]:
    """Decide about a single file: which tensors, and what is said in its header."""
    source, seen = given.source, given.seen
    for name in ("shard_size", "tokenizer", "prediction"):
        if getattr(conversion, name) is not None:
            raise RequestError(f"--{name.replace('_', '-')} is for folders, and the output is one file")
    if conversion.to is None:
        return tensors, Output(folder=False, metadata=convert_metadata(source))
    configs = configs_of(source)
    output = Output(folder=False, metadata=respelled_metadata(source) | known.as_metadata(configs))
    if source.container == "folder":
        tensors = marked(tensors, seen.family or "", configs.get("scheduler", {}))
    return tensors, output


def configs_of(source: TensorSource) -> dict[str, Config]:
    """Return the configs that a model came with, as files or in its metadata.

    Raises:
        CorruptFile: a config in a folder cannot be read.
    """
    if source.container == "folder":
        return known.of_folder(source.path, components_of(source.specs))
    return known.of_metadata(source.metadata)


def _folder(given: Given, tensors: Mapping[str, Ref], conversion: Conversion, options: Options, notes: Notes) -> Output:
    """Decide about everything in a folder beside its tensors."""
    source, family = given.source, given.seen.family
    output = Output(folder=True, metadata=convert_metadata(source), shard=conversion.shard_size)
    parts = components_of(tensors)
    if source.container == "folder":
        output.copies = {
            name: path
            for name, path in side_files(source.path).items()
            if conversion.only is None or name.partition("/")[0] in parts
        }
        if conversion.prediction is not None:
            config = known.of_folder(source.path, ()).get("scheduler", {})
            output.texts[SCHEDULER] = as_text({**config, "prediction_type": conversion.prediction})
        if conversion.tokenizer is not None:
            _tokenizers(output, family, parts, conversion.tokenizer, notes)
        return output
    output.metadata = respelled_metadata(source)
    if family is None:
        raise FamilyError(f"{source.path}: nothing tells its family, which its config depends on; give --family")
    whole = "vae" in parts and bool({"unet", "transformer"} & parts)
    configs = configs_of(source)
    schedule = Schedule()
    if whole:
        scheduler = configs.get("scheduler", {})
        schedule = schedule_of(given.seen, source, scheduler, conversion.prediction)
        _tokenizers(output, family, parts, conversion.tokenizer, notes)
    specs = {name: ref.spec for name, ref in tensors.items()}
    written = folder_configs(family, given.seen.variant, specs, schedule, configs)
    output.texts = written.texts | output.texts
    _say(written, parts, specs, options, notes)
    return output


def _tokenizers(output: Output, family: str | None, parts: set[str], folder: Path | None, notes: Notes) -> None:
    found = find_tokenizers(family or "", parts, folder)
    output.copies |= found.copies
    output.texts |= found.texts
    for name, like in found.lacking.items():
        notes.add(f"{name} is not in the folder: copy {like}'s files into it, or give --tokenizer")


def _say(written: Written, parts: set[str], specs: Mapping[str, Spec], options: Options, notes: Notes) -> None:
    """Note what a user should know about a new folder."""
    for assumed in written.assumed:
        notes.add(f"the tensors do not tell, so config.json assumes: {assumed}")
    if INDEX not in written.texts and parts - {"vae"}:
        notes.add(f"{INDEX} is not written: these are components, not a whole model")
    for name in specs if options.output_type is None else ():
        if name.endswith((".scale_weight", ".weight_scale")):
            notes.add(
                "fp8 weights keep factors beside them, which diffusers does not read; --dtype fp16 multiplies them",
                name,
            )


def components_of(names: Iterable[str]) -> set[str]:
    """Return the components that tensors of a folder belong to."""
    return {name.partition(".")[0] for name in names} - {EXTRAS}
