"""cloneofsimo's first files: a pickled list of factors, up and down in turn; the UNet's or the text encoder's."""

from __future__ import annotations

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.family import family_of
from sdformats.adapters.layout import AdapterFile, AdapterLayout
from sdformats.adapters.layouts import _slots
from sdformats.errors import CorruptFile
from sdformats.views import Ref, Stored


def read(_layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read a list; which network it is for shows by the shapes.

    Raises:
        FormatError: it is no list of pairs of factors.
    """
    where = str(file.source.path)
    refs: list[Ref] = [Stored(file.source, str(number)) for number in range(len(file.source.specs))]
    if any(str(number) not in file.source.specs for number in range(len(refs))) or len(refs) % 2:
        raise CorruptFile("is a list that is not up and down in turn", path=where)
    pairs = {number: (refs[2 * number], refs[2 * number + 1]) for number in range(len(refs) // 2)}
    for number, (up, down) in pairs.items():
        if len(up.shape) < 2 or len(down.shape) < 2 or up.shape[1] != down.shape[0]:
            raise CorruptFile(
                f"has factors that do not fit: {up.spec} and {down.spec}", path=where, key=str(2 * number)
            )
    square = {(up.shape[0], down.shape[1]) for up, down in pairs.values()}
    component = "te1" if len(square) == 1 and next(iter(square)) in ((768, 768), (1024, 1024)) else "unet"
    adapter = Adapter(dict(_slots.named(component, pairs, where)), metadata=dict(file.source.metadata))
    return Adapter(adapter.modules, metadata=adapter.metadata, family=family_of(adapter))


LAYOUT = AdapterLayout(
    name="cloneofsimo-list",
    title="cloneofsimo's pickled list of factors",
    written_by="cloneofsimo/lora (save_lora_weight)",
    read_by="cloneofsimo/lora",
    holds=frozenset({"lora"}),
    alpha="none",
    marks=(r"^\d+$",),
    families=("sd1", "sd2"),
    read=read,
    fits=lambda specs: len(specs) % 2 == 0 and all(len(spec.shape) in (2, 4) for spec in specs.values()),
)
