"""What each training method is measured by: one short run on the tiny base model, the same in the tests and in the benchmark.

Eight pictures of a concept that the model does not know are trained on; twenty-four others are asked about afterwards, and
as many of what it knew before. See `benchmarks.concept`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
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
        prior: whether pictures of what the model knows are shown as the class.
    """

    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ".safetensors"
    token: str = concept.TOKEN
    prior: bool = False


CASES: Mapping[str, Case] = {
    "fine-tuning": Case("finetune", {"lr": 1e-4}),
    "LoRA, rank 4": Case("lora", {"rank": 4, "lr": 3e-3}),
    "Custom Diffusion": Case(
        "custom-diffusion", {"lr": 3e-3, "words": ("<new1>",), "init": ("sks",)}, ".bin", token=NEW_WORD
    ),
    "hypernetwork, linear": Case("hypernetwork", {"lr": 3e-3}, ".pt"),
    "hypernetwork, relu": Case("hypernetwork", {"lr": 3e-3, "activation": "relu"}, ".pt"),
    "DreamBooth": Case("dreambooth", {"lr": 3e-5}),
    "DreamBooth, prior weight 1": Case("dreambooth", {"lr": 3e-5}, prior=True),
    "DreamBooth, prior weight 4": Case("dreambooth", {"lr": 3e-5, "prior_weight": 4.0}, prior=True),
}


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        concept, known: losses before and after, on the concept and on what the model knew.
        seconds: of the processor, for all steps.
        trained: how many numbers were trained.
        nbytes: of the file.
    """

    concept: tuple[float, float]
    known: tuple[float, float]
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


def questions(networks: Networks, token: str = concept.TOKEN) -> tuple[list[Batch], list[Batch]]:
    """Return what models are asked: about the concept, and about what the base knew."""
    about = concept.questions(networks, concept.diamonds(ASKED, seed=99, token=token))
    return about, concept.questions(networks, concept.known(ASKED, seed=98))


def measure(case: Case, folder: Path, seed: int = 0) -> Result:
    """Carry out a case in an empty folder; other seeds have other pictures, other noise and other starting values."""
    torch.set_num_threads(1)
    data = concept.write(concept.diamonds(TRAINED, seed=1 + seed, token=case.token), folder / "data")
    output = folder / f"out{case.ending}"
    values: dict[str, Any] = {**BASE, "data": str(data), "output": str(output), "seed": seed, **COMMON, **case.values}
    if case.prior:
        values["class_data"] = str(concept.write(concept.known(PRIOR, seed=50 + seed), folder / "class"))
    found = find(case.method)
    groups.check_names(values, {**groups.GROUPS, "method": found})
    made = {name: groups.made(cls, values, found.defaults) for name, cls in groups.GROUPS.items()}
    run = Run(groups.made(found, values), groups.Settings(**made), Silent())
    run.prepare()
    about, known = questions(run.networks, case.token)
    schedule = run.objective.schedule
    before = [concept.loss(run.networks, schedule, batches) for batches in (about, known)]
    run.networks.train(checkpointing=False)
    started = time.process_time()
    run.loop(None)
    seconds = time.process_time() - started
    after = [concept.loss(run.networks, schedule, batches) for batches in (about, known)]
    with nullcontext():
        [report, *_] = run.finish()
    trained = sum(parameter.numel() for parameter in run.trained.parameters.values())
    return Result((before[0], after[0]), (before[1], after[1]), seconds, trained, report.nbytes, run)
