"""Write what was trained, through the layouts and sinks that every command uses; and what is said about it in metadata."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdmerge
from sdformats.adapters.adapter import Adapter
from sdformats.adapters.reading import check_holds, needs_of
from sdformats.custom_diffusion.delta import Product
from sdformats.errors import OutputExists
from sdformats.files import open_source
from sdformats.layout import DIFFUSERS, SINGLE_FILE, detect
from sdformats.renamed import key_map, respelled, stored
from sdformats.tensor import DType, Spec
from sdkernels import linear, subspace
from sdmerge.errors import RequestError
from sdmerge.execute import report_of, write_plans
from sdmerge.lora.convert import layout_for
from sdmerge.lora.held import Held
from sdmerge.lora.refs import fold, in_type, step_of
from sdmerge.lora.texts import model_texts, network_texts
from sdmerge.options import OUTPUT_TYPES, Options
from sdmerge.policy import Notes
from sdmerge.provenance import convert_metadata
from sdmerge.step import Plan, ordered
from sdmerge.writing import plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from sdformats.adapters.layout import AdapterLayout, Written
    from sdformats.adapters.record import Record
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.method import TrainingMethod
    from sdmerge.train.settings import Settings


def dtype_of(settings: Settings) -> DType:
    """Return the type that new tensors are written in; ``keep`` keeps the float32 that they were trained in."""
    return OUTPUT_TYPES[settings.output.dtype] or DType.F32


def plainly(settings: Settings) -> Saving:
    """Return where a method without steps writes to.

    Raises:
        sdformats.errors.OutputExists: something is there, and may not be replaced.
    """
    from sdmerge.train.loop import Saving

    target = Path(settings.output.output)
    if target.exists() and not settings.output.overwrite:
        raise OutputExists.at(target)
    return Saving(target, 0, 0)


def _options(saving: Saving) -> Options:
    return Options(overwrite=True, dry_run=saving.dry_run)  # whether it may be replaced was asked before the run


def adapter_layout(family: str, to: str | None, modules: Mapping[str, Record]) -> AdapterLayout:
    """Return the layout that an adapter is written in: as asked for, or sd-scripts', or LyCORIS's where that has no names.

    Raises:
        RequestError: there is none of that name.
    """
    usual = layout_for(family, to)
    if to is None and any(needs_of(record) - usual.holds for record in modules.values()):
        return layout_for(family, "lycoris")
    return usual


def save_adapter(
    modules: Mapping[str, Record], family: str, to: str | None, texts: Mapping[str, str], saving: Saving
) -> Report:
    """Write an adapter.

    Args:
        modules: finished records, by module; see `sdmerge.train.inject.finished`.
        to: the layout's name; None: as `adapter_layout`.
        texts: metadata.

    Raises:
        sdformats.errors.FormatError: the layout cannot hold it, or it cannot be written.
        sdmerge.errors.RequestError: the output's name does not fit the layout.
    """
    started = time.perf_counter()
    layout = adapter_layout(family, to, modules)
    told = network_texts(family, layout, modules) | model_texts(family, saving.target.stem)
    adapter = Adapter(modules, metadata=told | dict(texts), family=family)
    check_holds(layout, adapter)
    if layout.write is None:
        raise AssertionError("check_holds refuses layouts that are only read")
    written = layout.write(layout, adapter, fold)
    notes = Notes()
    notes.add(f"as {layout.name}")
    return write_out(plan_of(written, (), family, notes), written, saving.target, _options(saving), started, "writing")


def save_model(changed: Mapping[str, Tensor], settings: Settings, texts: Mapping[str, str], saving: Saving) -> Report:
    """Write the model with some tensors replaced, in its own container, spelling and types.

    Args:
        changed: new tensors, by component (``unet``, ``te1``, ``te2``) and name there.
    """
    started = time.perf_counter()
    options = _options(saving)
    wanted = OUTPUT_TYPES[settings.output.dtype]
    with ExitStack() as stack:
        source = stack.enter_context(open_source(Path(settings.model.model)))
        tensors = _replaced(source, changed, settings.model.family)
        steps = []
        for name, ref in tensors.items():
            floats = wanted if ref.spec.dtype.is_float else None
            trained = any(isinstance(part, Held) for part in _leaves(ref))
            steps.append(replace(step_of(name, in_type(ref, floats)), why="train" if trained else "copy"))
        plan = Plan(ordered(steps, (source,)), tuple(tensors), (source,), (), None)
        if options.dry_run:
            return report_of(plan, saving.target, started)
        metadata = convert_metadata(source) | dict(texts)
        return write_plans([plan], [metadata], [saving.target], options, started, "writing")[0]


def held(values: Tensor, dtype: DType) -> Held:
    """Return a trained tensor as one to be written."""
    return Held(values.detach().float().cpu(), Spec(tuple(values.shape), dtype))


def product(weight: Tensor, base: Tensor, rank: int, dtype: DType) -> Product:
    """Return the best approximation, of a rank, of what a weight (out, in) changed."""
    change = linear.combine([(1.0, weight.detach().float().cpu(), base.float().cpu())])
    wide = change if change.shape[0] <= change.shape[1] else change.T
    vectors = subspace.leading(wide, min(rank, len(wide))).vectors
    up, down = vectors, vectors.T @ wide
    if wide is not change:
        up, down = down.T, up.T
    return Product(held(up.contiguous(), dtype), held(down.contiguous(), dtype))


def save_small(written: Written, family: str | None, saving: Saving) -> Report:
    """Write what a layout made of a small file, in the container that the output's name asks for.

    Raises:
        sdformats.errors.FormatError: it cannot be written.
        sdmerge.errors.RequestError: the output's name is not one for this layout.
    """
    started = time.perf_counter()
    plan = plan_of(written, (), family, Notes())
    return write_out(plan, written, saving.target, _options(saving), started, "writing")


def extracted(limit: str, settings: Settings, saving: Saving) -> list[Report]:
    """Write a LoRA of what a written model changed, beside it.

    Args:
        limit: ``rank=64``, ``size=64MB``, ``energy=0.9`` or ``error=0.2``.

    Raises:
        RequestError: it is none of these.
    """
    name, _, value = limit.partition("=")
    kinds: dict[str, Callable[[str], Any]] = {"rank": int, "size": str, "energy": float, "error": float}
    try:
        given = {name: kinds[name](value)}
    except (KeyError, ValueError):
        raise RequestError(f"extract is {limit!r} (expected {', '.join(f'{kind}=N' for kind in kinds)})") from None
    if saving.dry_run:
        return []
    from sdmerge.adapters import extract_lora

    target = saving.target.with_name(f"{saving.target.stem}-lora.safetensors")
    return extract_lora(saving.target, settings.model.model, target, overwrite=True, **given)


_FOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}


def _replaced(source: TensorSource, changed: Mapping[str, Tensor], family: str | None) -> dict[str, Ref]:
    """Return a model's tensors under their own names, with new ones in the places of some."""
    seen = detect(source.specs, family=family)
    dialects = {part.name: part.dialect for part in key_map(seen).components}
    tensors = stored(source)
    if seen.spelling != DIFFUSERS:
        tensors = respelled(tensors, seen, DIFFUSERS).tensors
    named: dict[tuple[str, str], str] = {}
    for name in tensors:
        component, _, bare = name.partition(".")
        if component in dialects:
            named[component, dialects[component](bare)] = name
    for name, value in changed.items():
        short, _, bare = name.partition(".")
        component = _FOLDERS[short]
        place = named[component, dialects[component](bare)]
        tensors[place] = Held(value.detach().float().cpu(), tensors[place].spec)
    return tensors if seen.spelling == DIFFUSERS else respelled(tensors, seen, SINGLE_FILE).tensors


def _leaves(ref: Ref) -> Iterator[Ref]:
    """Yield what a view is made of in the end."""
    if not ref.parts:
        yield ref
    for part in ref.parts:
        yield from _leaves(part)


_PATHS = (
    "model",
    "data",
    "output",
    "tokenizer",
    "model_config",
    "class_data",
    "clip",
    "style",
    "image",
    "init",
    "template",
)


def texts_of(method: TrainingMethod, settings: Settings, saving: Saving) -> dict[str, str]:
    """Return what is said about a training run, in sd-scripts' words where it has some, and completely in our own.

    Names only, never folders: a published file must not tell about its maker's disk.
    """
    import torch

    said: dict[str, Any] = {"method": method.name, **asdict(method)}
    for values in asdict(settings).values():
        said |= values
    for name in _PATHS:
        if isinstance(said.get(name), str):
            said[name] = Path(said[name]).name
    made = {"sdmerge": sdmerge.__version__, "torch": torch.__version__}
    run = settings.run
    return {
        "sdmerge.training": json.dumps({**said, "step": saving.step, "pictures": saving.pictures}, ensure_ascii=False),
        "sdmerge.made_with": json.dumps(made),
        "ss_sd_model_name": said["model"],
        "ss_steps": str(saving.step),
        "ss_learning_rate": str(settings.optimizer.lr),
        "ss_lr_scheduler": settings.optimizer.schedule,
        "ss_lr_warmup_steps": str(settings.optimizer.warmup),
        "ss_optimizer": settings.optimizer.optimizer,
        "ss_total_batch_size": str(run.batch),
        "ss_gradient_accumulation_steps": str(run.accumulate),
        "ss_seed": str(run.seed),
        "ss_num_train_images": str(saving.pictures),
        "ss_clip_skip": str(settings.model.clip_skip),
        "ss_noise_offset": str(settings.loss.noise_offset),
        "ss_min_snr_gamma": str(settings.loss.min_snr),
        "ss_output_name": saving.target.stem,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": saving.target.stem,
    }
