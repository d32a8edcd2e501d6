"""Models that are several files: diffusers folders and sharded sets, each as one source."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile, FormatError, UnknownFormat
from sdformats.keymap import EXTRAS, EXTRAS_FILE
from sdformats.tensor import TensorSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sdformats.tensor import Spec

    Opener = Callable[[Path], TensorSource]

INDEX = "model_index.json"
PEFT_CONFIG = "adapter_config.json"
LEARNED = ("learned_embeds", "learned_embeds_2")
"""The files in which diffusers puts the embeddings for SDXL's two text encoders."""
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights"
"""The file in which diffusers puts a Custom Diffusion delta. Its words are files of their own beside it, ``<new1>.bin``."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_NO_MODEL = ("scheduler", "tokenizer", "feature_extractor", "image_processor", "processor")
_STEP = re.compile(r"checkpoint-\d+")
"""How diffusers' trainers call the folders in which they keep what it takes to go on from a step."""
_STATE = re.compile(r"(optimizer|scheduler|sampler|scaler|dl_state_dict)(_\d+)?\.(bin|pt|safetensors)")
"""What accelerate keeps there beside the weights."""
_MAX_INDEX = 64 << 20
_IS_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_IS_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class _Choice:
    """What is read of a folder's files: one file or index, and the names set aside for it."""

    weights: Path
    aside: tuple[str, ...]

    def note(self, component: str = "") -> tuple[str, ...]:
        """Say what was set aside, if anything was."""
        if not self.aside:
            return ()
        return (f"{component}read {self.weights.name}, not {', '.join(sorted(self.aside))}",)


class JoinedSource(TensorSource):
    """Several sources as one.

    Args:
        path: the folder or index that names them.
        parts: prefix of the names, and source; owned from here on.
        notes: what was decided while choosing them.

    Raises:
        CorruptFile: two parts hold a tensor of one name.
    """

    def __init__(self, path: Path, parts: Sequence[tuple[str, TensorSource]], notes: Sequence[str] = ()) -> None:
        self.path = path
        self._parts = [source for _, source in parts]
        self._homes: dict[str, tuple[int, str]] = {}
        specs: dict[str, Spec] = {}
        metadata: dict[str, str] = {}
        for index, (prefix, source) in enumerate(parts):
            for key, spec in source.specs.items():
                name = prefix + key
                if name in specs:
                    self.close()
                    raise CorruptFile(f"is in {source.path.name} and in another file too", path=path, key=name)
                specs[name] = spec
                self._homes[name] = (index, key)
            metadata |= dict(source.metadata)
        self.specs = specs
        self.metadata = metadata
        self.notes = (*notes, *(f"{source.path.name}: {note}" for source in self._parts for note in source.notes))
        self.files = tuple(file for source in self._parts for file in source.files)
        self._first_file = [sum(len(s.files) for s in self._parts[:i]) for i in range(len(self._parts))]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        index, key = self._homes[name]
        self._parts[index].read_into(key, offset, buffer)

    def position(self, name: str) -> tuple[int, int]:
        index, key = self._homes[name]
        file, offset = self._parts[index].position(key)
        return self._first_file[index] + file, offset

    def extent(self, name: str) -> tuple[int, int] | None:
        index, key = self._homes[name]
        return self._parts[index].extent(key)

    def verify(self) -> None:
        for source in self._parts:
            source.verify()

    def close(self) -> None:
        for source in self._parts:
            source.close()


class FolderSource(JoinedSource):
    """A diffusers folder. Tensors are named ``component.key``: ``unet.conv_in.weight``."""

    container = "folder"


class ShardedSource(JoinedSource):
    """A sharded set, as its index says."""

    container = "sharded"


def open_folder(path: Path, opener: Opener) -> TensorSource:
    """Open a folder: a pipeline of components, or one component, sharded or not.

    Args:
        path: the folder.
        opener: opens one file.

    Raises:
        UnknownFormat: there is no model in it, or more than one reading.
        FormatError: as the files are.
    """
    adapters = _peft_adapters(path)
    if "" in adapters:
        return opener(adapters[""])
    if adapters:
        return FolderSource(path, [(f"{name}.", opener(weights)) for name, weights in adapters.items()])
    if not (path / INDEX).is_file() and (delta := _custom_diffusion(path)):
        return FolderSource(path, [(prefix, opener(file)) for prefix, file in delta])
    components = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith((".", *_NO_MODEL))]
    if not components and not (path / INDEX).is_file() and (learned := _learned(path)):
        return FolderSource(path, [(f"{name}.", opener(weights)) for name, weights in learned.items()])
    steps = [folder.name for folder in components if _STEP.fullmatch(folder.name)]
    components = [folder for folder in components if folder.name not in steps]
    own = _choose(path, of_pipeline=(path / INDEX).is_file())
    chosen = {p.name: choice for p in components if (choice := _choose(p)) is not None}
    if (path / INDEX).is_file() or (chosen and own is None):
        if not chosen:
            raise UnknownFormat("is a diffusers folder without weights", path=path, advice="download it completely")
        source = _open_components(path, chosen, opener, own)
        source.notes = (*_of_training(path, steps), *source.notes)
        return source
    return _open_alone(path, own, steps, opener)


def _open_alone(path: Path, own: _Choice | None, steps: Sequence[str], opener: Opener) -> TensorSource:
    """Open the one model of a folder that is no pipeline; errors as `open_folder`.

    Args:
        own: what is read of the folder's own files; None: they hold no weights.
        steps: the names of folders in it that a training run left.
    """
    if own is None and steps:
        raise UnknownFormat(f"is a training run's folder, with nothing but its steps ({', '.join(steps[:3])})", path=path,
                            advice="name one of them")  # fmt: skip
    if own is None:
        raise UnknownFormat(
            "is a folder without model weights", path=path, expected="a diffusers folder or a sharded set"
        )
    if own.aside and _stem(own.weights.name) not in _STEMS:
        others = ", ".join(sorted(own.aside)[:3])
        raise UnknownFormat(
            f"holds several models ({own.weights.name}, {others})", path=path, advice="name one of them"
        )
    source = opener(own.weights)
    source.notes = (*own.note(), *source.notes)
    return source


def _of_training(path: Path, steps: Sequence[str]) -> tuple[str, ...]:
    """Say of a folder that a training run left what it is."""
    if steps:
        return (f"a training run's output; its steps are left aside: {', '.join(steps)}",)
    if _STEP.fullmatch(path.name) and not (path / INDEX).is_file():
        return ("a step of a training run: what was trained, and no whole model",)
    return ()


def _open_components(path: Path, chosen: Mapping[str, _Choice], opener: Opener, beside: _Choice | None) -> FolderSource:
    parts: list[tuple[str, TensorSource]] = []
    notes: list[str] = []
    if beside is not None:
        left = ", ".join(sorted((beside.weights.name, *beside.aside)))
        notes.append(f"read the components, not {left}")
    try:
        for component, choice in chosen.items():
            parts.append((f"{component}.", opener(choice.weights)))
            notes += choice.note(f"{component}: ")
        if (path / EXTRAS_FILE).is_file():
            parts.append((f"{EXTRAS}.", opener(path / EXTRAS_FILE)))
    except BaseException:
        for _, source in parts:
            source.close()
        raise
    return FolderSource(path, parts, notes)


def _stem(name: str) -> str:
    return name.partition(".")[0].partition("-000")[0]


def _peft_adapters(path: Path) -> dict[str, Path]:
    """Return the weights of PEFT adapters: of the folder itself (""), or of the folders in it."""
    found = {}
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))):
        if not (folder / PEFT_CONFIG).is_file():
            continue
        weights = [folder / f"adapter_model{suffix}" for suffix in _WEIGHTS]
        there = [file for file in weights if file.is_file()]
        if there:
            found["" if folder == path else folder.name] = there[0]
    return found


def _learned(path: Path) -> dict[str, Path]:
    """Return the two files of an embedding for SDXL; nothing where they are not both there."""
    found = {}
    for name in LEARNED:
        there = [file for suffix in _WEIGHTS if (file := path / f"{name}{suffix}").is_file()]
        if there:
            found[name] = there[0]
    return found if len(found) == len(LEARNED) else {}


def _custom_diffusion(path: Path) -> list[tuple[str, Path]]:
    """Return the weights of a Custom Diffusion delta and the words beside them, as prefix and file; nothing where it is none."""
    weights = [file for suffix in _WEIGHTS if (file := path / f"{CUSTOM_DIFFUSION}{suffix}").is_file()]
    if not weights:
        return []
    words: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix in _WEIGHTS and file.is_file() and re.fullmatch(r"<.+>", file.stem):
            better = file.suffix == ".safetensors" or file.stem not in words
            words[file.stem] = file if better else words[file.stem]
    return [("", weights[0]), *(("modifier_token.", file) for file in words.values())]


def _choose(folder: Path, *, of_pipeline: bool = False) -> _Choice | None:
    """Return a component's weights (a file or an index) and the names set aside; None where there are none.

    safetensors before pickles, and full precision before a variant such as ``.fp16.``. A shard is part of a model and
    never taken for one.

    Raises:
        CorruptFile: there are shards and no index that names them, and nothing else to read.
    """
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith((".", EXTRAS))]
    files = [p for p in files if not _STATE.fullmatch(p.name)]
    indices = [p for p in files if _IS_INDEX.search(p.name)]
    shards = {shard for index in indices for shard in _shards_named(index)}
    plain = [p for p in files if p.suffix in _WEIGHTS and p.name not in shards]
    plain = [p for p in plain if not (p.suffix in (".pt", ".pth", ".ckpt") and _stem(p.name) not in _STEMS)]
    orphans = [p.name for p in plain if _IS_SHARD.search(p.name)]
    candidates = [*indices, *(p for p in plain if p.name not in orphans)]
    if not candidates:
        if orphans and not of_pipeline:
            raise CorruptFile(
                "is part of a sharded set, and there is no index that names it",
                path=folder / orphans[0],
                expected="a file named *.index.json beside it",
                advice="download the whole set",
            )
        return None

    def rank(path: Path) -> tuple[bool, bool, bool, str]:
        inner, found, _ = path.name.partition(".index.")
        pickled = not inner.endswith(".safetensors")
        variant = inner.count(".") > 1 or (bool(found) and not path.name.endswith(".index.json"))
        return pickled, _stem(inner) not in _STEMS, variant, path.name

    best = min(candidates, key=rank)
    return _Choice(best, (*(p.name for p in candidates if p != best), *orphans))


def _shards_named(index: Path) -> set[str]:
    try:
        return set(_weight_map(index).values())
    except FormatError:
        return set()  # told when, and only when, the index is the one that is opened


def open_index(path: Path, opener: Opener) -> ShardedSource:
    """Open a sharded set by its ``*.index.json``.

    Args:
        path: the index.
        opener: opens one shard, which must not be an index itself.

    Raises:
        CorruptFile: the index names files elsewhere, or it and its shards do not agree.
        FormatError: as the shards are.
    """
    placed = _weight_map(path)
    parts: list[tuple[str, TensorSource]] = []
    try:
        for shard in sorted(set(placed.values())):
            if not (path.parent / shard).is_file():
                raise CorruptFile(f"names {shard}, which is not there", path=path, advice="download the whole set")
            parts.append(("", opener(path.parent / shard)))
        for _, source in parts:
            for key in source.specs:
                if placed.get(key) != source.path.name:
                    said = placed.get(key, "no file")
                    raise CorruptFile(f"is in {source.path.name}, and the index says {said}", path=path, key=key)
        held = {key for _, source in parts for key in source.specs}
        for key, shard in placed.items():
            if key not in held:
                raise CorruptFile(f"is not in {shard}, where the index has it", path=path, key=key)
        return ShardedSource(path, parts)
    except BaseException:
        for _, source in parts:
            source.close()
        raise


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, in which each key must be said once: a second one would silently win."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is in it twice")
        found[key] = value
    return found


def _weight_map(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_INDEX:
        raise CorruptFile("is too large for an index", path=path, expected=f"at most {_MAX_INDEX:,} bytes")
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"is no valid index: {error}", path=path) from error
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CorruptFile("has no weight_map", path=path, expected="an object of tensor names and file names")
    for key, shard in placed.items():
        inside = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard and ":" not in shard
        if not inside or shard in ("", ".", ".."):
            raise CorruptFile(f"is said to be in {shard!r}", path=path, key=key, expected="a file beside the index")
    return placed
