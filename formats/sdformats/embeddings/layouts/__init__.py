"""The layouts of embeddings, one file each; every module here that has a `LAYOUT` is one."""

import importlib
import pkgutil

from sdformats.embeddings.layout import EmbeddingLayout

_ORDER = ("a1111", "diffusers", "diffusers_pair", "kohya", "onetrainer", "ai_toolkit", "hcp", "pivotal", "bundle")
"""The order in which people see them; a module that is not named here comes last."""


def _found() -> tuple[EmbeddingLayout, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.LAYOUT for module in modules if hasattr(module, "LAYOUT"))


LAYOUTS = _found()
"""Every layout; see `sdformats.embeddings.open_embedding`."""
