"""Every method learns a concept that the tiny base model does not know, and forgets no more than it may.

The runs are those of ``benchmarks/bench_train.py``, which carries them out with several seeds; thresholds are near half of
the effects that it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import train_cases

if TYPE_CHECKING:
    from pathlib import Path

LEAST = {
    "fine-tuning": 0.25,
    "LoRA, rank 4": 0.25,
    "Custom Diffusion": 0.15,
    "hypernetwork, linear": 0.2,
    "hypernetwork, relu": 0.2,
}
"""How much of the loss on the concept must be gone, at least."""


@pytest.mark.parametrize("name", [*LEAST])
def test_the_concept_is_learned(name: str, tmp_path: Path) -> None:
    result = train_cases.measure(train_cases.CASES[name], tmp_path)
    assert result.drop > LEAST[name]
    assert result.known[1] < 3 * result.known[0]


def test_prior_preservation_lessens_the_drift(tmp_path: Path) -> None:
    names = ("DreamBooth", "DreamBooth, prior weight 4")
    alone, beside = (train_cases.measure(train_cases.CASES[name], tmp_path / name) for name in names)
    assert alone.drop > 0.2
    assert beside.drop > 0.1
    assert beside.drift < 0.67 * alone.drift
