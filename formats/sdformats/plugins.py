"""Layouts that are found by themselves: every module of a package that has a ``LAYOUT``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def layouts_of(package: str, path: Iterable[str], order: Sequence[str]) -> tuple[Any, ...]:
    """Return the ``LAYOUT`` of each module that has one.

    Args:
        package: the name of the package.
        path: its ``__path__``.
        order: the modules that come first, in this order; others follow by name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(path))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return tuple(module.LAYOUT for module in modules if hasattr(module, "LAYOUT"))
