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


def measured(name: str, folder: Path) -> train_cases.Result:
    return train_cases.measure(train_cases.CASES[name], folder / name)


@pytest.mark.parametrize("name", ["fine-tuning", "hypernetwork, linear", "hypernetwork, relu"])
def test_the_concept_is_learned(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path)
    assert found.drop > 0.3
    assert found.known[1] < 3 * found.known[0]


def test_custom_diffusion_forgets_less_than_a_lora_and_learns_more_than_a_word(tmp_path: Path) -> None:
    names = ("LoRA, rank 4", "Custom Diffusion", "textual inversion, 4 vectors")
    lora, custom, word = (measured(name, tmp_path) for name in names)
    assert lora.drop > 0.35
    assert custom.drop > 0.25
    assert lora.concept[1] < custom.concept[1] < word.concept[1] < word.concept[0]
    assert custom.drift < 0.8 * lora.drift
    assert word.known[1] == word.known[0]


def test_prior_preservation_lessens_the_drift_of_the_class(tmp_path: Path) -> None:
    alone, beside = (measured(name, tmp_path) for name in ("DreamBooth", "DreamBooth, prior weight 1"))
    assert alone.drop > 0.3
    assert beside.drop > 0.25
    assert beside.class_drift < 0.75 * alone.class_drift
    assert beside.drift < alone.drift
