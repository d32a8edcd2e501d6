"""Embedding files of every layout, written by torch and safetensors alone, and read back by them."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    Vectors = Mapping[str, Tensor]
    """By encoder, (n, width)."""

WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5": 4096, "open_clip": 1024, "bert": 1280}
TEXTS = {"name": "inner", "step": 321, "sd_checkpoint": "abcd1234", "sd_checkpoint_name": "model-v1"}


def vectors(encoders: str, count: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Return vectors for encoders, named with spaces between them."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, WIDTHS[name], generator=source).to(dtype) for name in encoders.split()}


def a1111(tensor: Tensor) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, **TEXTS}


def put(layout: str, folder: Path, given: Vectors, token: str = "<cat>", stem: str = "cat") -> Path:  # noqa: C901 - one case for each
    """Write one word in a layout, as its own program would."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.{'pt' if layout in TORCH else 'safetensors'}"
    first = next(iter(given.values()))
    match layout:
        case "a1111":
            torch.save(a1111(first), path)
        case "a1111-inside":  # as the first versions of torch unpacked a ParameterDict
            torch.save({**a1111(first), "string_to_param": {"_parameters": {"*": first}}}, path)
        case "original":
            inside = torch.nn.ParameterDict({token: torch.nn.Parameter(first)})
            torch.save({"string_to_token": {token: torch.tensor(265)}, "string_to_param": inside}, path)
        case "hcp":
            torch.save({"string_to_param": {"*": first}, "name": "inner"}, path)
        case "diffusers":
            save_file({token: first}, path)
        case "diffusers-bin":
            torch.save({token: first}, path.with_suffix(".bin"))
            return path.with_suffix(".bin")
        case "diffusers-pair":
            inner = folder / stem
            inner.mkdir()
            save_file({token: given["clip_l"]}, inner / "learned_embeds.safetensors")
            save_file({token: given["clip_g"]}, inner / "learned_embeds_2.safetensors")
            return inner
        case "kohya":
            save_file({"emb_params": first} if len(given) == 1 else dict(given), path, {"ss_steps": "3"})
        case "onetrainer":
            save_file({"emp_params": first} if len(given) == 1 else dict(given), path)
        case "ai-toolkit":
            texts = {key: json.dumps(value) for key, value in TEXTS.items()} | {"software": '{"name": "ai-toolkit"}'}
            texts |= {"string_to_param": '{"*": "emb_params"}', "string_to_token": '{"*": 265}'}
            save_file({"emb_params": first} if len(given) == 1 else dict(given), path, texts)
        case "pivotal":
            save_file({token: first[0].contiguous()}, path, {token: "<embed>"})
        case "bundle":
            alone = {f"bundle_emb.{token}.string_to_param.*": first}
            save_file(alone if len(given) == 1 else {f"bundle_emb.{token}.{k}": v for k, v in given.items()}, path)
        case "pairs":
            rows = [{"emb": one, "emb2": two} for one, two in zip(given["clip_l"], given["clip_g"], strict=True)]
            torch.save(rows if len(rows) > 1 else rows[0], path)
        case "pti":
            save_file({"text_encoders_0": given["clip_l"], "text_encoders_1": given["clip_g"]}, path)
            (folder / "special_params.json").write_text(json.dumps({token: "<s0><s1>"}))
        case "bare":
            torch.save(first, path)
        case "png":
            return picture(path.with_suffix(".png"), a1111(first))
    return path


TORCH = ("a1111", "a1111-inside", "original", "hcp", "pairs", "bare")
ENCODERS = {
    "a1111": ("clip_l", "open_clip", "bert"),
    "a1111-inside": ("clip_l",),
    "original": ("clip_l", "bert"),
    "hcp": ("clip_l", "open_clip"),
    "diffusers": ("clip_l", "open_clip", "clip_g"),
    "diffusers-bin": ("clip_l", "open_clip"),
    "diffusers-pair": ("clip_l clip_g",),
    "kohya": ("clip_l", "open_clip", "clip_l clip_g", "clip_l t5", "clip_l clip_g t5"),
    "onetrainer": ("clip_l", "open_clip"),
    "ai-toolkit": ("clip_l", "clip_l clip_g"),
    "pivotal": ("clip_l", "open_clip"),
    "bundle": ("clip_l", "bert", "clip_l clip_g", "clip_l t5"),
    "pairs": ("clip_l clip_g",),
    "pti": ("clip_l clip_g",),
    "bare": ("clip_l", "open_clip"),
    "png": ("clip_l", "open_clip"),
}
"""Encoders that each layout is met with; `put` knows these names."""


def picture(path: Path, tree: Any) -> Path:
    """Write a picture with an embedding in its text."""

    def plain(value: Any) -> Any:
        return {"TORCHTENSOR": value.numpy().tolist()} if isinstance(value, torch.Tensor) else value

    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(tree, default=plain).encode()).decode())
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path, pnginfo=info)
    return path


def loaded(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a file, as torch and safetensors read it, by its path in the file."""
    if path.is_dir():
        return {f"{one.name}/{key}": t for one in sorted(path.iterdir()) for key, t in load_file(one).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    return dict(_inside("", torch.load(path, map_location="cpu", weights_only=True)))


def _inside(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _inside(f"{name}/{key}".lstrip("/"), item)]


def texts_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata() or {})


def bits(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()
