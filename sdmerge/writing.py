"""Write what a layout made of an adapter or of another small file, in the container that the output's name asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sdformats.folder_sink import FolderSink
from sdformats.png import PngSink
from sdformats.safetensors import SafetensorsSink
from sdformats.safetensors import layout as laid_out
from sdformats.torch_sink import SUFFIXES as TORCH_SUFFIXES
from sdformats.torch_sink import TorchZipSink, zip_size
from sdmerge import hashing
from sdmerge.errors import RequestError
from sdmerge.execute import report_of, write_plans
from sdmerge.lora.refs import in_type, step_of
from sdmerge.provenance import OF_OLD_BYTES
from sdmerge.step import Plan, ordered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdformats.adapters.layout import Written
    from sdformats.png.pixels import Pixels
    from sdformats.tensor import DType, Spec, TensorSink, TensorSource
    from sdmerge.execute import Report
    from sdmerge.options import Options
    from sdmerge.policy import Notes

    Paint = Callable[[], Pixels]

PNG = ".png"
_IN_FOLDER = ".safetensors/"


def typed(written: Written, dtype: DType | None) -> Written:
    """Return what a layout made with its floating tensors in another type; None: as they are."""
    return replace(written, tensors={name: in_type(ref, dtype) for name, ref in written.tensors.items()})


def plan_of(written: Written, sources: tuple[TensorSource, ...], family: str | None, notes: Notes) -> Plan:
    """Return the plan that writes what a layout made."""
    steps = [step_of(name, ref) for name, ref in written.tensors.items()]
    return Plan(ordered(steps, sources), tuple(written.tensors), sources, notes.lines(), family)


def metadata_of(written: Written) -> dict[str, str]:
    """Return the output's metadata, with room for sd-scripts' hashes where it is a file with sd-scripts' texts."""
    texts = {key: value for key, value in written.metadata.items() if key not in OF_OLD_BYTES} | {"format": "pt"}
    return texts | hashing.SD_SCRIPTS if "ss_network_module" in texts and not written.texts else texts


def size_of(written: Written, target: Path | None = None) -> int:
    """Return how many bytes a layout's tensors and texts take on the disk; in safetensors, unless the name asks for torch."""
    specs = {name: ref.spec for name, ref in written.tensors.items()}
    if target is not None and target.suffix.lower() in TORCH_SUFFIXES:
        return zip_size(specs, written.tree, target)
    header, _ = laid_out(specs, metadata_of(written))
    return len(header) + sum(spec.nbytes for spec in specs.values()) + sum(map(len, written.texts.values()))


def write_out(
    plan: Plan,
    written: Written,
    target: Path,
    options: Options,
    started: float,
    label: str,
    paint: Paint | None = None,
) -> Report:
    """Write what a layout made; in a dry run, say what would be.

    Args:
        plan: writes the tensors.
        written: what the layout made.
        target: where to write.
        options: see `Options`.
        started: when the command began, as `time.perf_counter` told it.
        label: what the progress is called.
        paint: returns the picture that the tensors are put into, where the output may be one.

    Raises:
        sdmerge.errors.RequestError: the output's name is not one for this layout.
        sdformats.errors.FormatError, sdmerge.errors.ValueRefused: as reading and writing do.
    """
    check_target(target, written, painted=paint is not None)
    if options.dry_run:
        return report_of(plan, target, started)
    make_sink = partial(_sink, written=written, overwrite=options.overwrite, paint=paint)
    return write_plans([plan], [metadata_of(written)], [target], options, started, label, make_sink)[0]


def check_target(target: Path, written: Written, *, painted: bool = False) -> None:
    """Refuse a name that does not fit the container.

    Raises:
        RequestError: so it is.
    """
    if _is_folder(written):
        if target.suffix:
            raise RequestError(f"{target}: this layout is a folder (expected a name without an ending)")
        return
    endings = (".safetensors", *(TORCH_SUFFIXES if written.tree is not None else ()), *((PNG,) if painted else ()))
    if target.suffix.lower() not in endings:
        raise RequestError(f"{target}: cannot be written (expected a name that ends in {' or '.join(endings)})")


def _is_folder(written: Written) -> bool:
    return bool(written.texts) or any(_IN_FOLDER in name for name in written.tensors)


def _sink(
    target: Path,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    *,
    written: Written,
    overwrite: bool,
    paint: Paint | None = None,
) -> TensorSink:
    if _is_folder(written):
        texts = written.texts
        return FolderSink(target, specs, metadata, None, place=_file_and_name, texts=texts, overwrite=overwrite)
    if target.suffix.lower() in TORCH_SUFFIXES:
        return TorchZipSink(target, specs, written.tree, overwrite=overwrite)
    if paint is not None and target.suffix.lower() == PNG:
        return PngSink(target, specs, written.tree, picture=paint(), overwrite=overwrite)
    seal = hashing.sd_scripts if metadata.keys() >= hashing.SD_SCRIPTS.keys() else None
    return SafetensorsSink(target, specs, metadata, overwrite=overwrite, seal=seal)


def sink_of_small(
    target: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], small: Written, *, overwrite: bool
) -> TensorSink:
    """Begin the output of a merge of small files: their settings, and what is known of the merge."""
    beside = {key: text for key, text in metadata.items() if key != "format"}
    tree = {**small.tree, **beside} if isinstance(small.tree, Mapping) else small.tree
    return _sink(target, specs, {**small.metadata, **metadata}, written=replace(small, tree=tree), overwrite=overwrite)


def _file_and_name(name: str) -> tuple[str, str]:
    """Take ``folder/file.safetensors/tensor`` apart."""
    file, _, key = name.partition(_IN_FOLDER)
    return f"{file}.safetensors", key
