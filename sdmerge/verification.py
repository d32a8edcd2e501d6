"""Derive a merge's tensors again from the recipe in its metadata, and compare them with what the file holds.

The recipe and the inputs' fingerprints stand in the output (see `sdmerge.provenance`). A run writes into a sink that
writes nothing: it compares. So whatever a merge can do is verified by the same code that did it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sdformats.errors import FormatError
from sdformats.files import open_source
from sdformats.tensor import TensorSink
from sdmerge import recipe_file
from sdmerge.errors import MismatchError, RequestError
from sdmerge.execute import open_adapter_of, open_model, shown
from sdmerge.options import OptionFields, Options
from sdmerge.plan import plan_merge
from sdmerge.provenance import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sdformats.tensor import TensorSource
    from sdmerge.arguments import PathLike
    from sdmerge.recipe import Recipe

_MODEL_NAMES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        path: the file that was verified.
        tensors: how many were derived again.
        different: those whose bytes are not the same.
        missing, extra: names that only the recipe gives, and names that only the file holds.
        inputs: the files that the recipe's models were found in.
        made_with: versions and device of the merge, where the file tells.
        notes: what may explain a difference.
    """

    path: Path
    tensors: int
    different: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    inputs: Mapping[str, Path]
    made_with: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether every tensor is bit for bit what the recipe gives, under the same names, types and shapes."""
        return not (self.different or self.missing or self.extra)


def verify(path: PathLike, *, inputs: PathLike | None = None, **options: Unpack[OptionFields]) -> Verdict:
    """Derive the tensors of a merge again and compare them.

    Args:
        path: an output of a merge.
        inputs: the folder with the merge's inputs; None is the output's own folder.
        options: device, threads and progress count; all that decides about bytes comes from the file.

    Raises:
        sdformats.errors.FormatError: a file cannot be read.
        RequestError: the file carries no recipe, or an input is not there.
        MismatchError: an input is not the file that it was.
    """
    from sdmerge.run import run

    target = Path(path)
    with ExitStack() as stack:
        output = stack.enter_context(open_source(target))
        recipe, entries, made_with = _recipe_of(output)
        folder = Path(inputs) if inputs is not None else target.resolve().parent
        found = _find_inputs(entries, folder, target)
        chosen = Options(**{**recipe.options, **_machine(options)})
        if "VAE" in found:
            chosen = replace(chosen, vae=found["VAE"])
        opened = {name: open_model(stack, found[name], chosen) for name in recipe.ids}
        vae = open_model(stack, found["VAE"], chosen) if "VAE" in found else None
        adapters = {name: open_adapter_of(stack, found[name]) for name in recipe.adapters}
        plan = plan_merge(recipe, opened, vae, chosen, adapters)
        common = frozenset(name for name, spec in plan.specs.items() if output.specs.get(name) == spec)
        sink = _Comparison(output, common)
        with shown(chosen, "verifying", plan.cost) as advance:
            run([(plan, sink)], chosen, advance)
        for source in (output, *plan.sources):
            source.verify()
    return Verdict(
        path=target,
        tensors=len(plan.specs),
        different=tuple(name for name in plan.specs if name in sink.different),
        missing=tuple(name for name in plan.specs if name not in common),
        extra=tuple(name for name in output.specs if name not in common),
        inputs=found,
        made_with=made_with,
        notes=_explanations(made_with, chosen),
    )


class _Comparison(TensorSink):
    """A sink that compares what it is given with what a source holds. Writes of one tensor never overlap."""

    def __init__(self, source: TensorSource, names: frozenset[str]) -> None:
        self.path = source.path
        self.different: set[str] = set()
        self._source = source
        self._names = names

    def write(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._names or name in self.different:
            return
        held = bytearray(len(buffer))
        self._source.read_into(name, offset, memoryview(held))
        if held != buffer:
            self.different.add(name)

    def commit(self) -> None:
        """Nothing was written."""

    def abort(self) -> None:
        """Nothing was written."""


def _machine(options: OptionFields) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("device", "threads", "progress")}


def _recipe_of(output: TensorSource) -> tuple[Recipe, Sequence[Mapping[str, Any]], Mapping[str, str]]:
    text = output.metadata.get("sdmerge.recipe")
    if text is None:
        raise RequestError(f"{output.path}: carries no recipe (expected an output of sdmerge's merges)")
    try:
        data = json.loads(text)
        entries = json.loads(output.metadata.get("sdmerge.inputs", "[]"))
        made_with = json.loads(output.metadata.get("sdmerge.made_with", "{}"))
        recipe = recipe_file.parse(data, Path())
        known = {str(entry["id"]): entry for entry in entries}
        wanted = [*recipe.ids, *(["VAE"] if "vae" in recipe.options else []), *recipe.adapters]
        entries = [{**known[name], "id": name} for name in wanted]
        if not all(isinstance(entry["name"], str) and isinstance(entry["fingerprint"], str) for entry in entries):
            raise TypeError("an input without name or fingerprint")
        made_with = {str(key): str(value) for key, value in dict(made_with).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RequestError) as error:
        raise RequestError(f"{output.path}: its recipe cannot be read: {type(error).__name__}: {error}") from error
    return recipe, entries, made_with


def _find_inputs(entries: Sequence[Mapping[str, Any]], folder: Path, target: Path) -> dict[str, Path]:
    """Return where each input is: by name first, else any model in the folder with the right fingerprint.

    Names come from a file that may be hostile: only their last part counts, so that nothing outside the folder is opened.
    """
    found: dict[str, Path] = {}
    prints: dict[Path, str] = {}
    for entry in entries:
        name = Path(entry["name"].replace("\\", "/")).name
        candidates = [folder / name, *(one for one in _models(folder) if one != folder / name)]
        for candidate in candidates:
            if candidate.exists() and candidate.resolve() != target.resolve():
                if candidate not in prints:
                    prints[candidate] = _print_of(candidate)
                if prints[candidate] == entry["fingerprint"]:
                    found[entry["id"]] = candidate
                    break
        if entry["id"] in found:
            continue
        if (folder / name).exists():
            raise MismatchError(
                f"{folder / name}: is not the {entry['id']} that was merged: its fingerprint is {prints.get(folder / name)} "
                f"(expected {entry['fingerprint']})"
            )
        raise RequestError(f"{folder / name}: the input {entry['id']} is not there; name its folder with --inputs")
    return found


def _models(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in _MODEL_NAMES or (path / "model_index.json").is_file():
                yield path


def _print_of(path: Path) -> str:
    try:
        with open_source(path) as source:
            return fingerprint(source)
    except (FormatError, OSError):
        return "unreadable"


def _explanations(made_with: Mapping[str, str], options: Options) -> tuple[str, ...]:
    import torch

    notes = []
    if made_with.get("torch", torch.__version__) != torch.__version__:
        notes.append(f"the merge was made with torch {made_with['torch']}, this is {torch.__version__}")
    if made_with.get("device", options.device) != options.device:
        notes.append(f"the merge was made with --device {made_with['device']}, this is {options.device}")
    return tuple(notes)
