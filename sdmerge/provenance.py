"""What an output's metadata says about where it came from.

``sdmerge.recipe`` is enough to run the merge again; ``sdmerge.inputs`` identifies the inputs by name, size and fingerprint
(and sha256 where asked for). Names only, never folders: a published file must not tell about its maker's disk. No dates
either: the same merge gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import sdmerge
from sdformats.configs import known
from sdmerge import hashing, recipe_file
from sdmerge.options import RECIPE_OPTIONS
from sdmerge.recipe import Merge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sdformats.positional import InputFile
    from sdformats.tensor import TensorSource
    from sdmerge.options import Options
    from sdmerge.recipe import Recipe
    from sdmerge.step import Plan

_SAMPLE = 4096
_SAMPLES = 16
_HEAD = 64 << 10
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "sd3": "stable-diffusion-3-medium",
    "flux": "flux-1-dev",
}
_RESOLUTIONS = {"sd1": 512, "sd2": 512, "sdxl": 1024, "sdxl-refiner": 1024, "sd3": 1024, "flux": 1024}
OF_OLD_BYTES = (*hashing.SD_SCRIPTS, "modelspec.hash_sha256")
"""Texts that are hashes of a file's bytes, and wrong once these change."""
_ONCE = "sdmerge.once"
_A1111_NAMES = {"add_difference": "Add difference", "weighted_sum": "Weighted sum"}


def fingerprint(source: TensorSource) -> str:
    """Return a cheap identity of a file or folder: sha256, in hex, over a sample of each of its files.

    Of each file, in order: its size as 8 little-endian bytes, its first 64 KiB (the header of most files), 16 blocks of
    4 KiB at equal distances, and its last 4 KiB. It tells files apart that were made differently; it is no protection
    against someone who wants two files to look alike.
    """
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(file.size.to_bytes(8, "little"))
        for offset, size in _sampled(file):
            digest.update(file.read(offset, size))
    return digest.hexdigest()


def _sampled(file: InputFile) -> list[tuple[int, int]]:
    spots = [(0, _HEAD)]
    spots += [(file.size * i // _SAMPLES, _SAMPLE) for i in range(_SAMPLES)]
    spots.append((max(0, file.size - _SAMPLE), _SAMPLE))
    return [(offset, min(size, file.size - offset)) for offset, size in spots]


def describe_inputs(sources: Sequence[TensorSource], labels: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """Return what identifies each input, ready for JSON."""
    found = []
    for label, source in zip(labels, sources, strict=True):
        entry: dict[str, Any] = {
            "id": label,
            "name": source.path.name,
            "size": sum(file.size for file in source.files),
            "fingerprint": fingerprint(source),
        }
        if len(source.files) == 1:
            entry["legacy_hash"] = hashing.legacy(source.files[0])
            if options.hash_inputs:
                entry["sha256"] = hashing.sha256(source.files[0])
        elif options.hash_inputs:
            root = source.path if source.container == "folder" else source.path.parent
            entry["sha256"] = {file.path.relative_to(root).as_posix(): hashing.sha256(file) for file in source.files}
        if "sdmerge.recipe" in source.metadata:
            entry["recipe"] = source.metadata["sdmerge.recipe"]
        found.append(entry)
    return found


def merge_metadata(
    plan: Plan, recipe: Recipe, inputs: Sequence[Mapping[str, Any]], options: Options, output: Path
) -> dict[str, str]:
    """Return the metadata of a merge's output; all values are texts, as safetensors wants it."""
    import torch

    data = recipe_file.as_data(recipe, {name: getattr(options, name) for name in RECIPE_OPTIONS})
    made_with = {"sdmerge": sdmerge.__version__, "torch": torch.__version__, "device": options.device}
    return {
        "format": "pt",
        "sdmerge.recipe": _json(data),
        "sdmerge.inputs": _json(list(inputs)),
        "sdmerge.made_with": _json(made_with),
        "sd_merge_recipe": _json(_a1111_recipe(recipe, inputs, options, output)),
        "sd_merge_models": _json(_a1111_models(plan, inputs)),
        **_modelspec(plan, inputs, output),
    }


def convert_metadata(source: TensorSource) -> dict[str, str]:
    """Return the metadata of a conversion: what the file carried, and the format's own mark."""
    return {**source.metadata, "format": "pt"}


def respelled_metadata(source: TensorSource) -> dict[str, str]:
    """Return the metadata of a conversion that changes names: without hashes of the old bytes.

    A recipe is kept as what the model was before: it would not give these tensors again.
    """
    found = convert_metadata(source)
    before = {key: found.pop(key) for key in ("sdmerge.recipe", "sdmerge.inputs", "sdmerge.made_with") if key in found}
    found = {key: text for key, text in found.items() if key not in (*OF_OLD_BYTES, known.KEY, _ONCE)}
    return found | ({"sdmerge.before": _json(before)} if before else {})


def said_once(names: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a folder whose single file did not hold some tensors twice, as others do."""
    return {_ONCE: _json(sorted(names))} if names else {}


def once_in(metadata: Mapping[str, str]) -> list[str]:
    """Return the names that `said_once` put into a folder's metadata."""
    found = _parsed(metadata.get(_ONCE))
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _hash_of(entry: Mapping[str, Any]) -> str:
    """Return the sha256 where it is known, else the fingerprint: the legacy hash is the same for many fine-tunes."""
    sha = entry.get("sha256")
    return sha if isinstance(sha, str) else str(entry["fingerprint"])


def _a1111_recipe(
    recipe: Recipe, inputs: Sequence[Mapping[str, Any]], options: Options, output: Path
) -> dict[str, Any]:
    merge = recipe.merge
    models = [_hash_of(entry) for entry in inputs if entry["id"] in recipe.ids]
    if isinstance(merge, Merge):
        name = _A1111_NAMES.get(merge.method.name, merge.method.name)
        alpha = None if merge.differs else merge.values.get("alpha", merge.values.get("weights"))
    else:
        name, alpha = "bake", None
    return {
        "type": "sdmerge",
        "primary_model_hash": models[0],
        "secondary_model_hash": models[1] if len(models) > 1 else None,
        "tertiary_model_hash": models[2] if len(models) > 2 else None,
        "interp_method": name,
        "multiplier": alpha,
        "save_as_half": options.dtype == "fp16",
        "custom_name": output.stem,
        "bake_in_vae": next((entry["name"] for entry in inputs if entry["id"] == "VAE"), "None"),
    }


def _a1111_models(plan: Plan, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    models = {}
    for source, entry in zip(plan.sources, inputs, strict=True):
        earlier = source.metadata.get("sd_merge_recipe")
        models[_hash_of(entry)] = {
            "name": entry["name"],
            "legacy_hash": entry.get("legacy_hash"),
            "sd_merge_recipe": _parsed(earlier),
        }
    return models


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _modelspec(plan: Plan, inputs: Sequence[Mapping[str, Any]], output: Path) -> dict[str, str]:
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": output.stem,
        "modelspec.merged_from": ", ".join(_title(s, e) for s, e in zip(plan.sources, inputs, strict=True)),
    }
    if plan.family in ARCHITECTURES:
        suffix = "" if plan.variant in (None, "base") else f"-{plan.variant}"
        found["modelspec.architecture"] = ARCHITECTURES[plan.family] + suffix
        found["modelspec.resolution"] = resolution(plan.family)
    if "v_pred" in plan.specs:
        found["modelspec.prediction_type"] = "v"
    return found


def resolution(family: str) -> str:
    """Return the resolution of a family's models, as the model specification says it."""
    return f"{_RESOLUTIONS[family]}x{_RESOLUTIONS[family]}"


def _title(source: TensorSource, entry: Mapping[str, Any]) -> str:
    title = source.metadata.get("modelspec.title") or str(entry["name"]).removesuffix(".safetensors").removesuffix(
        ".ckpt"
    )
    return title.replace(",", " ")
