"""diffusers makes of our files what we say, and we make of its files what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sdmerge import convert
from tests.sdmerge.lora.pipelines import (
    all_weights,
    assert_equal,
    assert_same_changes,
    lora_file,
    our_changes,
    pipeline,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("diffusers", reason="is an independent reader")
pytest.importorskip("peft", reason="diffusers reads LoRA with it")


def fused(pipe: Any, file: Path) -> dict[str, Tensor]:
    """Return the weights after diffusers has loaded a file and fused it."""
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    names = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None]
    pipe.fuse_lora(components=names)
    return all_weights(pipe)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_reads_mixed_ranks_and_alphas(tmp_path: Path, family: str, dora: bool) -> None:
    pipe = pipeline(family)
    before = all_weights(pipe)
    file = lora_file(tmp_path / "in.safetensors", before, family, dora=dora)
    target = tmp_path / "out.safetensors"
    convert(file, target, to="diffusers")
    changes = our_changes(file, before)
    assert changes.keys() == before.keys(), "every module is in the file"
    assert_equal(our_changes(target, before), changes)
    assert_same_changes(fused(pipe, target), before, changes)


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sdxl", "kohya"), ("sdxl", "kohya-sgm")])
def test_diffusers_reads_sd_scripts_names(tmp_path: Path, family: str, layout: str) -> None:
    pipe = pipeline(family)
    before = all_weights(pipe)
    # diffusers takes the underscore of lora_unet_add_embedding for a dot, and leaves it out; as label_emb it finds it.
    named = {path: weight for path, weight in before.items() if layout != "kohya" or "add_embedding" not in path}
    file = lora_file(tmp_path / "in.safetensors", named, family, uniform=True)
    convert(file, tmp_path / "diffusers.safetensors", to="diffusers")
    target = tmp_path / "out.safetensors"
    convert(tmp_path / "diffusers.safetensors", target, to=layout)
    assert_same_changes(fused(pipe, target), before, our_changes(file, before))
