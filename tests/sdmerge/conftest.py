"""Models of every family in both spellings, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdmerge import api
from tests import tiny
from tests.sdmerge.converted import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders as diffusers writes them, by family."""
    root = tmp_path_factory.mktemp("folders")
    return {family: tiny.save_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def files(folders: Mapping[str, Path]) -> Mapping[str, Path]:
    """Single files made of them."""
    found = {family: folder.parent / f"{family}.safetensors" for family, folder in folders.items()}
    for family, file in found.items():
        api.convert(folders[family], file, to="single-file")
    return found
