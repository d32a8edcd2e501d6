"""Configs of a diffusers folder: shipped as data, one file for each family, with sizes filled in from the tensors' shapes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Protocol

from sdformats.configs import networks, text, vae
from sdformats.configs.shapes import Shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import Spec

Config = dict[str, Any]
EPSILON, V = "epsilon", "v_prediction"
INDEX = "model_index.json"
DIFFUSERS_VERSION = "0.42.1"
"""The release whose spelling is written."""
SCHEDULER = "scheduler/scheduler_config.json"
_SCHEDULER_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{1,60}Scheduler")


class _Fill(Protocol):
    def __call__(self, config: Config, shapes: Shapes, *, told: bool) -> tuple[str, ...]: ...


_FILL: Mapping[str, _Fill] = {
    "UNet2DConditionModel": networks.fill_unet,
    "SD3Transformer2DModel": networks.fill_sd3,
    "FluxTransformer2DModel": networks.fill_flux,
    "AutoencoderKL": vae.fill_vae,
    "clip_text_model": text.fill_clip,
    "t5": text.fill_t5,
}


@dataclass(frozen=True)
class Schedule:
    """What a model was trained to predict, where that is known.

    Attributes:
        prediction: ``epsilon`` or ``v_prediction``; None: as the family's models do.
        zero_snr: whether nothing is left of the signal at the last step.
    """

    prediction: str | None = None
    zero_snr: bool = False


@dataclass
class Written:
    """The texts of a folder.

    Attributes:
        texts: by file name.
        assumed: what the tensors do not tell and is not as in the family's models, one line each.
    """

    texts: dict[str, str] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)


@cache
def shipped(family: str) -> Mapping[str, Any]:
    """Return a family's data: its pipelines by variant, components with their configs, tokenizers. Not to be changed."""
    text_of = resources.files(__name__).joinpath(f"{family}.json").read_text("utf-8")
    found: Mapping[str, Any] = json.loads(text_of)
    return found


def folder_configs(
    family: str,
    variant: str | None,
    specs: Mapping[str, Spec],
    schedule: Schedule,
    known: Mapping[str, Config] | None = None,
) -> Written:
    """Return the configs of a folder's components, and its index where it is a whole model.

    Args:
        family: one of `sdformats.layout.FAMILIES`.
        variant: which of the family's pipelines the model is for.
        specs: the folder's tensors, ``component.key``.
        schedule: what the model predicts.
        known: configs that the model came with, by component. What is no size is taken from them.
    """
    data, known = shipped(family), known or {}
    variants = data.get("variants", {})
    changes = {**variants.get(variant, {}), **variants.get(schedule.prediction, {})}
    there = {name.partition(".")[0] for name in specs}
    made = Written()
    classes: dict[str, Any] = {}
    for component, base in data["components"].items():
        classes[component] = [None, None]
        if component not in there:
            continue
        told = _class_of(known.get(component, {})) == _class_of(base)
        config = _with({**base, **changes.get(component, {})}, known[component] if told else {})
        assumed = _FILL[_class_of(base)](config, Shapes(specs, component), told=told)
        made.assumed += [f"{component}: {one}" for one in assumed]
        made.texts[f"{component}/config.json"] = as_text(config)
        classes[component] = _library(config)
    if {"unet", "transformer"} & there and "vae" in there:
        scheduler = _scheduler(data, changes.get("scheduler", {}), schedule, known.get("scheduler", {}))
        classes["scheduler"] = ["diffusers", scheduler["_class_name"]]
        for name, tokenizer in data["tokenizers"].items():
            encoder = name.replace("tokenizer", "text_encoder")
            classes[name] = ["transformers", tokenizer["class"]] if encoder in there else [None, None]
        pipeline = data["pipelines"].get(variant) or next(iter(data["pipelines"].values()))
        made.texts[SCHEDULER] = as_text(scheduler)
        index = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION, **data["index"], **classes}
        made.texts[INDEX] = as_text(index)
    return made


def as_text(config: Config) -> str:
    """Return a config as it is written."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _library(config: Config) -> list[str]:
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def _class_of(config: Config) -> str:
    return str(config.get("_class_name") or config.get("model_type") or "")


def _with(base: Config, known: Config) -> Config:
    """Return a config with what is known of it: values that it has a place for, of the kind that belongs there."""
    fits = {name: value for name, value in known.items() if name in base and _alike(value, base[name])}
    return {
        **base,
        **fits,
        **{name: base[name] for name in ("_class_name", "model_type", "architectures") if name in base},
    }


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return False
    return one is None or other is None or _sort(one) is _sort(other)


def _sort(value: Any) -> type:
    """Return what a value is: one number for all levels and a list of them are of one sort."""
    return type(value) if isinstance(value, bool | str) else list


def _scheduler(data: Mapping[str, Any], changes: Config, schedule: Schedule, known: Config) -> Config:
    """Return a scheduler's config: what is known of it, or the family's, with what the model predicts."""
    base = {**data["scheduler"], **changes}
    if _SCHEDULER_CLASS.fullmatch(_class_of(known)):
        base = {name: value for name, value in known.items() if name == "_class_name" or not name.startswith("_")}
    if schedule.zero_snr and "rescale_betas_zero_snr" not in base and "zero_snr_scheduler" in data:
        base = dict(data["zero_snr_scheduler"])
    if schedule.zero_snr:
        base |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if schedule.prediction is not None:
        base["prediction_type"] = schedule.prediction
    return base
