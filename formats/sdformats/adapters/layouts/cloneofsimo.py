"""cloneofsimo's lora as safetensors: numbers instead of names, ``unet:0:up``; trained words beside them, ``<s1>``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.family import family_of
from sdformats.adapters.layout import AdapterFile, AdapterLayout, Written
from sdformats.adapters.layouts import _slots
from sdformats.adapters.reading import kept_metadata, scale_folded
from sdformats.adapters.records import LoRA
from sdformats.errors import CorruptFile, UnsupportedFile
from sdformats.views import Ref, Stored, reshaped

if TYPE_CHECKING:
    from sdformats.adapters.fused import Fold
    from sdformats.adapters.record import Record

_NAME = re.compile(r"(\w+):(\d{1,4}):(up|down)")
_COMPONENTS = {"unet": "unet", "text_encoder": "te1"}
_CLASSES = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "text_encoder": '["CLIPAttention"]'}
_EMBED = "<embed>"


def read(layout: AdapterLayout, file: AdapterFile) -> Adapter:
    """Read numbered factors and words.

    Raises:
        FormatError: a name is none of the layout's, or the numbers are of no known selection of modules.
    """
    where = str(file.source.path)
    halves: dict[str, dict[int, dict[str, Ref]]] = {}
    embeddings: dict[str, dict[str, Ref]] = {}
    for key in file.source.specs:
        ref = Stored(file.source, key)
        match = _NAME.fullmatch(key)
        if match is not None and match[1] in _COMPONENTS:
            halves.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = ref
        elif file.source.metadata.get(key) == _EMBED or (key.startswith("<") and key.endswith(">")):
            embeddings[key] = {"*": ref}
        else:
            raise UnsupportedFile("is no name of the layout cloneofsimo", path=where, key=key)
    modules: dict[str, Record] = {}
    for name, numbered in halves.items():
        for number, half in numbered.items():
            if len(half) < 2:
                raise CorruptFile("has one factor alone", path=where, key=f"{name}:{number}")
        pairs = {number: (half["up"], half["down"]) for number, half in numbered.items()}
        modules |= _slots.named(_COMPONENTS[name], pairs, where)
    adapter = Adapter(modules, embeddings, kept_metadata(layout, file.source.metadata))
    return Adapter(modules, embeddings, adapter.metadata, family_of(adapter))


def write(layout: AdapterLayout, adapter: Adapter, fold: Fold) -> Written:
    """Write numbers, which mean something only if every attention layer is there.

    Raises:
        CannotHold: modules are missing, or there are others.
    """
    tensors: dict[str, Ref] = {}
    metadata = dict(adapter.metadata)
    for name, component in _COMPONENTS.items():
        mine = [path for path in adapter.modules if path.startswith(f"{component}.")]
        if not mine:
            continue
        with_geglu = any(path.endswith("ff.net.0.proj") for path in mine)
        for number, path in enumerate(_numbered(adapter, name, mine, geglu=with_geglu)):
            record = scale_folded(path, adapter.modules[path], fold)
            assert isinstance(record, LoRA), "the layout holds nothing else"
            tensors |= {f"{name}:{number}:up": record.up, f"{name}:{number}:down": record.down}
            metadata[f"{name}:{number}:rank"] = str(record.rank)
        metadata[name] = _CLASSES[name] if with_geglu or name != "unet" else '["CrossAttention", "Attention"]'
    for word, inner in adapter.embeddings.items():
        if set(inner) != {"*"} or inner["*"].spec.numel != inner["*"].shape[-1]:
            raise CannotHold("has more than one vector", key=word, advice="choose another with --to")
        bracketed = word if word.startswith("<") else f"<{word}>"
        tensors[bracketed] = reshaped(inner["*"], inner["*"].shape[-1:])
        metadata[bracketed] = _EMBED
    return Written(tensors, metadata)


def _numbered(adapter: Adapter, name: str, mine: list[str], *, geglu: bool) -> list[str]:
    """Return the paths of a component's modules in the order of their numbers.

    Args:
        name: the file's name of the component.
        mine: the paths of those that were trained.
        geglu: whether GEGLU is among them.

    Raises:
        CannotHold: modules are missing, or there are others.
    """
    if name == "unet":
        inside = _slots.unet_modules(geglu=4 if geglu else None)
    elif len(mine) == 96:
        inside = _slots.text_modules(24)
    else:
        inside = _slots.text_modules(23 if adapter.family == "sd2" else 12)
    order = [f"{_COMPONENTS[name]}.{path}" for path in inside]
    if missing := [path for path in order if path not in adapter.modules]:
        raise CannotHold(
            "is not trained, but the layout cloneofsimo numbers all attention layers",
            key=missing[0],
            advice="choose another with --to",
        )
    if extra := [path for path in mine if path not in order]:
        raise CannotHold(
            f"has no number in the layout cloneofsimo, nor have {len(extra) - 1:,} more",
            key=extra[0],
            advice="choose another with --to",
        )
    return order


LAYOUT = AdapterLayout(
    name="cloneofsimo",
    title="cloneofsimo's numbered factors as safetensors",
    written_by="cloneofsimo/lora (lora_pti)",
    read_by="cloneofsimo/lora",
    holds=frozenset({"lora", "embeddings"}),
    alpha="none",
    marks=(r"^\w+:\d+:(up|down)$",),
    families=("sd1", "sd2"),
    read=read,
    write=write,
    keep=(r"\w+:\d+:rank$", "unet$", "text_encoder$", "<.*>$"),
)
