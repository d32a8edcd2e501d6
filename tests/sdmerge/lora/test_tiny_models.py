"""Extraction from the tiny fine-tunes: at equal bytes a size is never worse than a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sdmerge

TINY = Path(__file__).parents[3] / "examples" / "tiny"


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("name", ["shape", "texture"])
def test_a_size_is_at_least_2_percent_better_than_a_rank(name: str, rank: int, tmp_path: Path) -> None:
    models = TINY / f"tiny-{name}.safetensors", TINY / "tiny-base.safetensors"
    fixed, sized = tmp_path / "fixed.safetensors", tmp_path / "sized.safetensors"
    reports = [tmp_path / "fixed.json", tmp_path / "sized.json"]
    sdmerge.extract_lora(*models, fixed, rank=rank, report=reports[0])
    sdmerge.extract_lora(*models, sized, size=fixed.stat().st_size, report=reports[1])
    assert sized.stat().st_size <= fixed.stat().st_size
    errors = [json.loads(path.read_text())["error"] for path in reports]
    assert 0 < errors[1] <= 0.98 * errors[0]
