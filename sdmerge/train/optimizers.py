"""Optimizers, the course of their learning rate, and the average of the weights."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sdkernels import linear
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from sdmerge.train.method import Trained
    from sdmerge.train.settings import OptimizerSettings


def optimizer_for(trained: Trained, settings: OptimizerSettings) -> Optimizer:
    """Return the optimizer, with a group of parameters for each learning rate.

    Raises:
        RequestError: it needs a package that is not here, or cannot have several rates.
    """
    groups: dict[float, list[Parameter]] = {}
    for name, parameter in trained.parameters.items():
        groups.setdefault(trained.rates.get(name, 1.0), []).append(parameter)
    # `rate` is ours: the group's factor of the run's learning rate
    given = [{"params": members, "lr": settings.lr * rate, "rate": rate} for rate, members in groups.items()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(given, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    if settings.optimizer == "prodigy" and len(groups) > 1:
        raise RequestError("prodigy finds one rate for all that is trained (expected --text-lr to be the same as --lr)")
    package, name = _ELSEWHERE[settings.optimizer]
    try:
        make: Callable[..., Any] = getattr(__import__(package, fromlist=[name]), name)
    except ImportError as error:
        raise RequestError(f"the optimizer {settings.optimizer} needs {package} ({error}); pip install it") from error
    made: Optimizer = make(given, lr=settings.lr, weight_decay=settings.weight_decay)
    return made


_ELSEWHERE = {"adamw8bit": ("bitsandbytes.optim", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}


def rate_at(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Return what the learning rate is multiplied with in a step, counted from 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


class Average:
    """An exponential average of weights: a ← a + (1 - decay) (w - a), with a decay that grows from 0 with the steps.

    Early on the decay is (1 + step) / (10 + step), so that the start is soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            old = self.values[name]
            self.values[name] = linear.combine([(1.0, old), (share, parameter.detach(), old)])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the weights' place for a while."""
        before: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            before[name], parameter.data = parameter.data, self.values[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = before[name]
