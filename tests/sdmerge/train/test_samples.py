"""Pictures painted on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.sdmerge.train import runs
from tests.sdmerge.train.test_loop import same

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sheet_grows_with_the_steps_and_changes_nothing(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    values = {"rank": 2, "targets": "attention", "steps": 4, "lr": 3e-2}
    painted, plain = tmp_path / "painted.safetensors", tmp_path / "plain.safetensors"
    prompts = ("a red heart", "a sks diamond")
    run = runs.trained("lora", toy, diamonds, painted, sample_every=2, sample_steps=3, sample_prompt=prompts, **values)
    runs.trained("lora", toy, diamonds, plain, **values)
    assert same(painted, plain)
    names = sorted(path.name for path in (run.folder / "samples").iterdir())
    assert names == ["000002-0.png", "000002-1.png", "000004-0.png", "000004-1.png"]
    pictures = [np.asarray(Image.open(run.folder / "samples" / name)).astype(int) for name in names]
    assert np.abs(pictures[0] - pictures[2]).max() > 0
    with Image.open(run.folder / "samples.png") as sheet:
        assert sheet.height > 2 * 192
