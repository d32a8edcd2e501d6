"""The layouts of embeddings, one file each; every module here that has a `LAYOUT` is one."""

from sdformats.embeddings.layout import EmbeddingLayout
from sdformats.plugins import layouts_of

_ORDER = ("a1111", "diffusers", "diffusers_pair", "kohya", "onetrainer", "ai_toolkit", "hcp", "pivotal", "bundle")
"""The order in which people see them; a module that is not named here comes last."""

LAYOUTS: tuple[EmbeddingLayout, ...] = layouts_of(__name__, __path__, _ORDER)
"""Every layout; see `sdformats.embeddings.open_embedding`."""
