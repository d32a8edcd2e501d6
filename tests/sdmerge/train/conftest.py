"""What the tests of training have in common: a model, and pictures of a concept that it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import concept
from sdmerge.demo import load_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model as a diffusers folder, as diffusers itself writes it."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    load_pipeline(concept.TINY / "tiny-base.safetensors", concept.TINY / "config").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def single() -> Path:
    """The tiny base model as a single file."""
    return concept.TINY / "tiny-base.safetensors"


@pytest.fixture(scope="session")
def diamonds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of the unknown concept."""
    return concept.write(concept.diamonds(8, seed=1), tmp_path_factory.mktemp("data") / "diamonds")
