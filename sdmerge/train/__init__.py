"""Training: every classic method over one loop.

`run` carries out a training run. A method is one file (see `sdmerge.train.method`); the loop, the data, the noise, saving and
resuming are shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmerge.train import settings as groups
from sdmerge.train.log import Silent
from sdmerge.train.method import METHODS, find

if TYPE_CHECKING:
    from sdmerge.execute import Report
    from sdmerge.train.log import Tell

__all__ = ["METHODS", "run"]


def run(method: str, *, tell: Tell | None = None, **values: Any) -> list[Report]:
    """Train by a method, and write what was trained.

    Args:
        method: its name, one of `METHODS`.
        tell: how the run speaks; None: not at all.
        values: settings of the method and of `sdmerge.train.settings`, by name.

    Raises:
        sdmerge.train.data.DataProblems: the data is not fit to be trained on.
        sdmerge.errors.RequestError: the request cannot be fulfilled.
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    found = find(method)
    groups.check_names(values, {**groups.GROUPS, "method": found})
    made = {name: groups.made(cls, values, found.defaults) for name, cls in groups.GROUPS.items()}
    return groups.made(found, values).run(groups.Settings(**made), tell or Silent())
