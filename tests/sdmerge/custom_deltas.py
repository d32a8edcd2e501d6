"""Custom Diffusion deltas of the tiny model, in every form, as their trainers save them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.formats.pickle_oracle import same

if TYPE_CHECKING:
    from collections.abc import Mapping

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
MODEL = TINY / "tiny-base.safetensors"
SGM = "model.diffusion_model."
FORMS = ("original", "delta", "diffusers")


@cache
def base() -> dict[str, Tensor]:
    """Return the tiny model's keys and values, float32, by their names in its file."""
    return {key: tensor.float() for key, tensor in load_file(MODEL).items() if re.search(r"attn2\.to_[kv]", key)}


@cache
def names() -> dict[str, str]:
    """Return diffusers' names by those of the single file, told by diffusers itself."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config: dict[str, Any] = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    weights = load_file(MODEL)
    numbered = {
        key: torch.tensor(float(i)) if tensor.dim() < 4 else tensor for i, (key, tensor) in enumerate(weights.items())
    }
    turned = convert_ldm_unet_checkpoint(dict(numbered), config)
    by_number = {float(tensor): key for key, tensor in turned.items() if tensor.dim() == 0}
    return {key: by_number[float(numbered[key])] for key in base()}


def trained(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return new keys and values, by the single file's names."""
    source = torch.Generator().manual_seed(seed)
    return {key: (old + 0.05 * torch.randn(old.shape, generator=source)).to(dtype) for key, old in base().items()}


def vector(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a word."""
    return (0.3 * torch.randn(48, generator=torch.Generator().manual_seed(seed))).to(dtype)


WORDS = {"<new1>": vector(1), "<new2>": vector(2)}


def output(folder: Path, form: str, name: str) -> Path:
    """Return where a delta of a form is written: a folder or a file."""
    return folder / (name if form == "diffusers" else f"{name}.bin")


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two deltas' weights or words are the same, bit for bit and in type."""
    return same(dict(sorted(one.items())), dict(sorted(other.items())))


def original(weights: Mapping[str, Tensor], words: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the first implementation saves."""
    return {"state_dict": dict(weights) | ({"embed": torch.stack(list(words.values()))} if words else {})}


def delta(weights: Mapping[str, Tensor], words: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what its diffusers version saves."""
    return {"unet": {names()[key]: tensor for key, tensor in weights.items()}, "modifier_token": dict(words)}


def processors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what diffusers' trainer saves, but for the words."""
    turned = {names()[key]: tensor for key, tensor in weights.items()}
    return {re.sub(r"attn2\.(to_[kv])", r"attn2.processor.\1_custom_diffusion", key): t for key, t in turned.items()}


def save(path: Path, form: str, weights: Mapping[str, Tensor], words: Mapping[str, Tensor]) -> Path:
    """Write a delta."""
    if form == "diffusers":
        path.mkdir(exist_ok=True)
        torch.save(processors(weights), path / "pytorch_custom_diffusion_weights.bin")
        for word, tensor in words.items():
            torch.save({word: tensor}, path / f"{word}.bin")
        return path
    torch.save({"original": original, "delta": delta}[form](weights, words), path)
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a delta in any form, by torch and safetensors alone: weights by the single file's names, and words."""
    back = {name: key for key, name in names().items()}
    if path.is_dir():
        weights = load_file(path / "pytorch_custom_diffusion_weights.safetensors")
        words = {file.stem: load_file(file)[file.stem] for file in sorted(path.glob("<*"))}
        return {
            back[re.sub(r"processor\.(to_[kv])_custom_diffusion", r"\1", key)]: t for key, t in weights.items()
        }, words
    found = torch.load(path, weights_only=True)
    if "state_dict" in found:
        inner = dict(found["state_dict"])
        rows = inner.pop("embed", torch.zeros(0, 48))
        return inner, {f"<new{i}>": row for i, row in enumerate(rows, 1)}
    return {back[key]: tensor for key, tensor in found["unet"].items()}, found["modifier_token"]
