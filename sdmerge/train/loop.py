"""The training loop that every method shares."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, ParameterList

from sdformats.errors import FormatError, OutputExists
from sdmerge.errors import RequestError
from sdmerge.train import checkpoint, data
from sdmerge.train.batches import Batch, Source
from sdmerge.train.buckets import mixed
from sdmerge.train.loading import load
from sdmerge.train.log import Log
from sdmerge.train.losses import schedule_of
from sdmerge.train.networks import TYPES
from sdmerge.train.objective import Objective
from sdmerge.train.optimizers import Average, optimizer_for, rate_at, set_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdmerge.execute import Report
    from sdmerge.train.log import Tell
    from sdmerge.train.method import LoopMethod, Trained
    from sdmerge.train.settings import Settings

_FREE = {
    "run": ("steps", "device"),
    "output": None,
    "model": ("tokenizer", "model_config"),
    "data": ("data",),
}
"""Settings that may change when a run goes on; None: all of the group."""


@dataclass(frozen=True)
class Saving:
    """How the result is to be written.

    Attributes:
        target: the file or folder.
        step: steps done.
        pictures: how many pictures were trained on.
        dry_run: only find out whether it could be written.
    """

    target: Path
    step: int
    pictures: int
    dry_run: bool = False


def train(method: LoopMethod, settings: Settings, tell: Tell) -> list[Report]:
    """Train, and write what was trained.

    Raises:
        sdmerge.train.data.DataProblems: the data is not fit to be trained on; nothing was written.
        sdmerge.errors.RequestError: the request cannot be fulfilled.
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    return Run(method, settings, tell).go()


class Trainee(Module):
    """The loss as a module, so that Accelerate can spread it over devices: only what is trained is a parameter of it."""

    def __init__(self, method: LoopMethod, objective: Objective, trained: Trained) -> None:
        super().__init__()
        self._method, self._objective = method, objective
        self.trained = ParameterList(trained.parameters.values())

    def forward(self, batches: Sequence[Batch], weights: Sequence[float]) -> Tensor:
        """Return the weighted losses of a batch of each folder, [folders]."""
        losses = [weight * self._method.loss(self._objective, b) for b, weight in zip(batches, weights, strict=True)]
        return torch.stack(losses)


class Run:
    """A training run: what it was made from, and where it is."""

    def __init__(self, method: LoopMethod, settings: Settings, tell: Tell) -> None:
        import accelerate

        self.method, self.settings, self.tell = method, settings, tell
        self.target = Path(settings.output.output)
        self.folder = self.target.with_name(self.target.name + ".run")
        precision = settings.run.precision
        # Accelerate keeps one state for a process; an earlier run in it may have had another precision.
        accelerate.state.AcceleratorState._reset_state()
        self.accelerator = accelerate.Accelerator(
            cpu=settings.run.device == "cpu", mixed_precision="no" if precision == "fp32" else precision
        )
        self.step = 0
        self.sources: list[Source] = []

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes, of those that train together."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        found: torch.device = self.accelerator.device
        return found

    @property
    def pictures(self) -> int:
        """How many pictures are trained on."""
        return sum(len(source.items) for source in self.sources)

    def go(self) -> list[Report]:
        """Carry it out; see `train`."""
        self.prepare()
        if not self.is_main:
            self.loop(None)
            return []
        log = Log(self.folder, self.step)
        try:
            self.loop(log)
            log.paint()
        finally:
            log.close()
        return self.finish()

    def prepare(self) -> None:
        """Read and check everything, so that what is wrong is known before the first step.

        Raises:
            as `train`.
        """
        settings = self.settings
        self._check_output()
        self.networks = load(settings.model)
        schedule = schedule_of(self.networks.scheduler, settings.loss, settings.model.prediction)
        self.networks.to(self.device, TYPES[settings.run.precision])
        with self.accelerator.main_process_first():
            self.parts = self.method.parts(settings, self.networks, self.tell)
        found = [data.find(p.folder, caption=p.caption, captions=self.method.captions) for p in self.parts]
        torch.manual_seed(settings.run.seed)
        self.trained = self.method.attach(self.networks, settings)
        for items in found:
            self.method.check(items)
        if not self.trained.parameters:
            raise RequestError(f"{self.method.name}: there is nothing to train in this model (see what was asked for)")
        self.networks.to(self.device, TYPES[settings.run.precision])
        for parameter in self.trained.parameters.values():
            parameter.data = parameter.data.to(self.device)
        self.networks.train(checkpointing=settings.run.checkpointing)
        self.method.save(self.trained, self.networks, settings, self._saving(self.target, dry_run=True))
        self.objective = Objective(
            self.networks, schedule, settings.loss.min_snr, self.trained.reads_texts, self.trained.told
        )
        self.sources = [self._source(items, i) for i, items in enumerate(found)]
        self._encode()
        trainee = Trainee(self.method, self.objective, self.trained)
        self.optimizer = optimizer_for(self.trained, settings.optimizer)
        self.trainee, self.optimizer = self.accelerator.prepare(trainee, self.optimizer)
        ema = settings.optimizer.ema
        self.average = Average(self.trained.parameters, ema) if ema else None
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if settings.output.resume:
            self._resume()

    def loop(self, log: Log | None) -> None:
        """Take the steps that are left."""
        steps = self.settings.run.steps
        with self.tell.progress("training", max(0, steps - self.step)) as advance:
            while self.step < steps:
                started = time.perf_counter()
                loss, rate = self._step()
                self.step += 1
                if self.average is not None:
                    self.average.update(self.step)
                if log is not None:
                    seconds = round(time.perf_counter() - started, 4)
                    figures = self.method.figures(self.trained)
                    log.add(self.step, {"loss": loss, "lr": rate, "seconds": seconds, **figures})
                    advance(1, "  ".join(f"{name} {value:.4f}" for name, value in {"loss": loss, **figures}.items()))
                self._periodic(log)

    def finish(self) -> list[Report]:
        """Write the result."""
        every = self.settings.output.save_every
        if every and self.step % every:
            self._save_state()
        return self._write(self.target)

    def _step(self) -> tuple[float, float]:
        """Take one step of the optimizer; return the loss and the learning rate."""
        settings = self.settings
        rate = settings.optimizer.lr * rate_at(self.step, settings.run.steps, settings.optimizer)
        set_rate(self.optimizer, rate)
        accumulate = settings.run.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(accumulate):
            number = self.step * accumulate + part
            batches = [source(number).to(self.device) for source in self.sources]
            # what networks draw themselves, in dropout, follows from the step too
            torch.manual_seed(mixed(settings.run.seed, number, 3, self.accelerator.process_index))
            last = part == accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.trainee), self.accelerator.autocast():
                loss = self.trainee(batches, [one.weight for one in self.parts]).sum() / accumulate
            self.accelerator.backward(loss)
            total += loss.detach()
        if settings.optimizer.clip_norm:
            self.accelerator.clip_grad_norm_(self.trained.parameters.values(), settings.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.trained)
        return float(self.accelerator.reduce(total, "mean")), rate

    def _periodic(self, log: Log | None) -> None:
        output = self.settings.output
        if log is None:
            return
        if output.save_every and self.step % output.save_every == 0:
            self._save_state()
            log.paint()
        if output.sample_every and self.step % output.sample_every == 0:
            self._paint()
        if output.export_every and self.step % output.export_every == 0 and self.step < self.settings.run.steps:
            self._write(self.target.with_name(f"{self.target.stem}-{self.step:06d}{self.target.suffix}"))

    def _paint(self) -> None:
        """Paint with what is trained so far, and lay all pictures of the run out on one sheet."""
        from sdmerge.train.samples import paint_samples

        output = self.settings.output
        prompts = output.sample_prompt or tuple(dict.fromkeys(one.caption for one in self.sources[0].items))[:4]
        with nullcontext() if self.average is None else self.average.applied():
            paint_samples(self.folder, self.step, prompts, self.networks, self.settings)

    def _write(self, target: Path) -> list[Report]:
        with nullcontext() if self.average is None else self.average.applied():
            return self.method.save(self.trained, self.networks, self.settings, self._saving(target))

    def _saving(self, target: Path, *, dry_run: bool = False) -> Saving:
        return Saving(target, self.step, self.pictures, dry_run)

    def _source(self, items: Sequence[data.Item], index: int) -> Source:
        settings = self.settings
        return Source(
            items,
            self.networks,
            settings.data,
            settings.loss,
            batch=settings.run.batch,
            seed=mixed(settings.run.seed, index),
            place=self.accelerator.process_index,
            places=self.accelerator.num_processes,
            device=self.device,
            method=self.method,
        )

    def _encode(self) -> None:
        """Encode pictures, and say what was decided about them."""
        with self.tell.progress("encoding", sum(len(source.items) for source in self.sources)) as advance:
            for source in self.sources:
                source.encode_all(lambda done: advance(done, ""))
        for source in self.sources:
            for note in source.notes():
                self.tell.note(note)

    def _check_output(self) -> None:
        output = self.settings.output
        if not self.is_main or output.overwrite:
            return
        if self.target.exists():
            raise OutputExists.at(self.target)
        if self.folder.exists() and not output.resume:
            advice = "pass --resume to go on with that run, or --overwrite to begin again"
            raise OutputExists("exists already", path=self.folder, advice=advice)

    def _identity(self) -> dict[str, Any]:
        """Return what must not change for a run to go on."""
        found: dict[str, Any] = {"method": self.method.name, **asdict(self.method)}
        for group, values in asdict(self.settings).items():
            free = _FREE.get(group, ())
            if free is not None:
                found |= {name: value for name, value in values.items() if name not in free}
        found["model"] = Path(self.settings.model.model).name
        found["processes"] = self.accelerator.num_processes
        listed = [(item.path.name, item.caption, item.size) for source in self.sources for item in source.items]
        found["data"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return found

    def _save_state(self) -> None:
        parts = {
            "weights": {name: one.detach() for name, one in self.trained.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average is not None else {},
        }
        scaler = self.accelerator.scaler
        parts["scaler"] = scaler.state_dict() if scaler is not None else {}
        state = checkpoint.State(self.step, self._identity(), parts)
        try:
            checkpoint.save(self.folder, state, self.settings.output.keep)
        except FormatError as error:
            self.tell.warn(f"the state after step {self.step:,} was not saved, an older one is kept: {error}")

    def _resume(self) -> None:
        state = checkpoint.newest(self.folder, self._identity())
        if state is None:
            self.tell.note(f"{self.folder}: holds no state to go on from; beginning with the first step")
            return
        with torch.no_grad():
            for name, parameter in self.trained.parameters.items():
                parameter.copy_(state.parts["weights"][name])
        self.optimizer.load_state_dict(state.parts["optimizer"])
        if self.average is not None:
            self.average.values = {name: one.to(self.device) for name, one in state.parts["average"].items()}
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.parts["scaler"])
        self.step = state.step
        self.tell.note(f"going on after step {self.step:,}")
