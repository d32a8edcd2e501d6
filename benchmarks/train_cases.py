"""What each training method is measured by: one short run on the tiny base model, the same in the tests and in the benchmark.

Eight pictures of a concept that the model does not know are trained on; twenty-four others are asked about afterwards, and
as many of what it knew before. DreamBooth calls the concept by a rare word and its class, a shape that the model knows; how
far the class drifts is asked of pictures of that shape. See `benchmarks.concept`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import concept
from sdmerge.train import settings as groups
from sdmerge.train.log import Silent
from sdmerge.train.loop import Run
from sdmerge.train.method import find

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdmerge.train.batches import Batch
    from sdmerge.train.networks import Networks

TRAINED, ASKED, PRIOR = 8, 24, 100
NEW_WORD = "<new1> diamond"
CLASS = "square"
THING = f"sks {CLASS}"
BASE = {"model": str(concept.TINY / "tiny-base.safetensors"), "model_config": str(concept.TINY / "config")}
COMMON: Mapping[str, Any] = {"steps": 40, "batch": 8, "device": "cpu", "dtype": "fp32"}


@dataclass(frozen=True)
class Case:
    """A run to be measured.

    Attributes:
        method: the training method.
        values: its settings, beside `COMMON`.
        ending: of the output's name.
        token: what captions call the concept.
        prior: whether pictures of the class are shown beside: of `CLASS`, or of all that the model knows.
    """

    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ".safetensors"
    token: str = concept.TOKEN
    prior: bool = False

    @property
    def kind(self) -> str:
        """The shape that is the concept's class; empty: all shapes are."""
        return CLASS if self.token == THING else ""


_DREAMBOOTH: Mapping[str, Any] = {"lr": 3e-5, "steps": 100, "batch": 4}
_CUSTOM: Mapping[str, Any] = {"lr": 3e-3, "words": ("<new1>",), "init": ("sks",)}
_INVERSION: Mapping[str, Any] = {
    "lr": 0.02,
    "schedule": "cosine",
    "vectors": 4,
    "token": "<new1>",
    "template": "captions",
    "init": "sks",
}
CASES: Mapping[str, Case] = {
    "fine-tuning": Case("finetune", {"lr": 1e-4}),
    "LoRA, rank 4": Case("lora", {"rank": 4, "lr": 3e-3}),
    "Custom Diffusion": Case("custom-diffusion", _CUSTOM, ".bin", token=NEW_WORD, prior=True),
    "Custom Diffusion, no class": Case("custom-diffusion", _CUSTOM, ".bin", token=NEW_WORD),
    "textual inversion, 4 vectors": Case("textual-inversion", _INVERSION, ".pt", token=NEW_WORD),
    "hypernetwork, linear": Case("hypernetwork", {"lr": 3e-3}, ".pt"),
    "hypernetwork, relu": Case("hypernetwork", {"lr": 3e-3, "activation": "relu"}, ".pt"),
    "DreamBooth": Case("dreambooth", _DREAMBOOTH, token=THING),
    "DreamBooth, prior weight 1": Case("dreambooth", _DREAMBOOTH, token=THING, prior=True),
}


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        concept, known, kind: losses before and after, on the concept, on what the model knew, and on the concept's class.
        seconds: of the processor, for all steps.
        trained: how many numbers were trained.
        nbytes: of the file.
    """

    concept: tuple[float, float]
    known: tuple[float, float]
    kind: tuple[float, float]
    seconds: float
    trained: int
    nbytes: int
    run: Run = field(repr=False)

    @property
    def drop(self) -> float:
        """By how much the loss on the concept fell, as a part of what it was."""
        return 1 - self.concept[1] / self.concept[0]

    @property
    def drift(self) -> float:
        """By how much the loss on what the model knew rose."""
        return self.known[1] - self.known[0]

    @property
    def class_drift(self) -> float:
        """By how much the loss on the concept's class rose."""
        return self.kind[1] - self.kind[0]


def questions(networks: Networks, token: str = concept.TOKEN, kind: str = "") -> tuple[list[Batch], ...]:
    """Return what models are asked: about the concept, about what the base knew, and about the concept's class, if any."""
    asked = [concept.diamonds(ASKED, seed=99, token=token), concept.known(ASKED, seed=98)]
    if kind:
        asked.append(concept.known(ASKED, seed=97, kind=kind))
    return tuple(concept.questions(networks, pictures) for pictures in asked)


def measure(case: Case, folder: Path, seed: int = 0) -> Result:
    """Carry out a case in an empty folder; other seeds have other pictures, other noise and other starting values."""
    torch.set_num_threads(1)
    data = concept.write(concept.diamonds(TRAINED, seed=1 + seed, token=case.token), folder / "data")
    output = folder / f"out{case.ending}"
    values: dict[str, Any] = {**BASE, "data": str(data), "output": str(output), "seed": seed, **COMMON, **case.values}
    if case.prior:
        values["class_data"] = str(
            concept.write(concept.known(PRIOR, seed=50 + seed, kind=case.kind), folder / "class")
        )
    found = find(case.method)
    groups.check_names(values, {**groups.GROUPS, "method": found})
    made = {name: groups.made(cls, values, found.defaults) for name, cls in groups.GROUPS.items()}
    run = Run(groups.made(found, values), groups.Settings(**made), Silent())
    run.prepare()
    asked = questions(run.networks, case.token, case.kind)
    schedule = run.objective.schedule
    before = [concept.loss(run.networks, schedule, batches) for batches in asked]
    run.networks.train(checkpointing=False)
    started = time.process_time()
    run.loop(None)
    seconds = time.process_time() - started
    after = [concept.loss(run.networks, schedule, batches) for batches in asked]
    [report, *_] = run.finish()
    trained = sum(parameter.numel() for parameter in run.trained.parameters.values())
    about, known, *of_class = zip(before, after, strict=True)
    return Result(about, known, of_class[0] if of_class else known, seconds, trained, report.nbytes, run)
