"""Tokenizers of a diffusers folder: their files are copied where the user has them; none is shipped, and none fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdformats.configs import shipped
from sdformats.errors import CorruptFile, UnknownFormat
from sdformats.folder_sink import side_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WORDS = {"CLIPTokenizer": "vocab.json", "T5TokenizerFast": "spiece.model"}
_ALGORITHMS = {"CLIPTokenizer": "BPE", "T5TokenizerFast": "Unigram"}
_WHOLE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"


@dataclass
class Tokenizers:
    """What is there of a folder's tokenizers.

    Attributes:
        copies: files to copy, by their name inside the folder.
        texts: files that are written otherwise than they were.
        lacking: by the name of each tokenizer that is not there, where one like it is published.
    """

    copies: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


def find_tokenizers(family: str, components: set[str], folder: Path | None) -> Tokenizers:
    """Find a model's tokenizers.

    Args:
        family: one of `sdformats.layout.FAMILIES`.
        components: what the model has: a tokenizer is for the text encoder of its name.
        folder: a diffusers folder, from which each is taken, or the folder of one tokenizer, which is taken for all that
            are of its kind; None: there are none.

    Raises:
        UnknownFormat: there is no tokenizer in the folder.
    """
    made = Tokenizers()
    for name, data in shipped(family)["tokenizers"].items():
        if name.replace("tokenizer", "text_encoder") not in components:
            continue
        files = {} if folder is None else _files(folder, name, data)
        if not files:
            made.lacking[name] = data["like"]
        made.copies |= {f"{name}/{file}": path for file, path in files.items()}
        if files and "pad_token" in data and not (folder is not None and (folder / name).is_dir()):
            made.texts |= _padded(name, files, data["pad_token"])
    if folder is not None and not made.copies:
        raise UnknownFormat(
            "holds no tokenizer", path=folder, expected="vocab.json and merges.txt, or a diffusers folder"
        )
    return made


def _files(folder: Path, name: str, data: Mapping[str, str]) -> dict[str, Path]:
    own = folder / name
    if own.is_dir():
        return side_files(own)
    there = {file: path for file, path in side_files(folder).items() if "/" not in file}
    return there if _is_of_kind(there, data["class"]) else {}


def _is_of_kind(files: Mapping[str, Path], kind: str) -> bool:
    """Whether files are those of a tokenizer of a kind: by its words, or by how the newer single file says it splits."""
    if _WORDS[kind] in files or any(word in files for word in _WORDS.values()):
        return _WORDS[kind] in files
    if _WHOLE not in files:
        return False
    try:
        model = json.loads(files[_WHOLE].read_text(encoding="utf-8"))["model"]["type"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CorruptFile(f"is no tokenizer: {error}", path=files[_WHOLE]) from error
    return bool(model == _ALGORITHMS[kind])


def _padded(name: str, files: Mapping[str, Path], token: str) -> dict[str, str]:
    """Return the config of a tokenizer that fills up with a word of its own, as the family's does."""
    config = json.loads(files[_CONFIG].read_text(encoding="utf-8")) if _CONFIG in files else {}
    return {f"{name}/{_CONFIG}": json.dumps({**config, "pad_token": token}, indent=2) + "\n"}
