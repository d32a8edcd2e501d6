"""Embeddings that people made and shared: what becomes of them is what torch and safetensors read, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import sdmerge
from sdformats.embeddings import open_embedding
from sdformats.files import open_source
from sdformats.views import bits
from tests.sdmerge.embedding import samples

if TYPE_CHECKING:
    from torch import Tensor

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
MANIFEST: list[dict[str, Any]] = json.loads((REAL / "manifest.json").read_text()) if REAL.is_dir() else []
NAMES = [entry["file"] for entry in MANIFEST if entry["kind"].startswith("ti-")]
JUDGED = [name for name in NAMES if not name.endswith(".png") and "parameterdict" not in name]
"""Those that torch and safetensors read without running anything."""


def vectors(path: Path) -> dict[str, bytes]:
    with open_source(path) as source:
        (word,) = open_embedding(source)[0].words
        return {encoder: bits(ref).tobytes() for encoder, ref in word.vectors.items()}


@pytest.mark.parametrize("name", JUDGED)
def test_vectors_are_what_others_read(name: str) -> None:
    expected = sorted(samples.bits(tensor)[1] for tensor in samples.loaded(REAL / name).values())
    assert sorted(vectors(REAL / name).values()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_through_every_container_and_back(tmp_path: Path, name: str) -> None:
    before = vectors(REAL / name)
    for ending in (".pt", ".safetensors", ".bin") if len(before) == 1 else (".pt", ".safetensors", ""):
        sdmerge.convert(REAL / name, tmp_path / f"o{ending}")
        assert vectors(tmp_path / f"o{ending}") == before
    sdmerge.convert(REAL / name, tmp_path / "o.png")
    wide = "bf16" if "myPuppet" in name else "fp16" if "unaesthetic" in name else "keep"
    sdmerge.convert(tmp_path / "o.png", tmp_path / "back.safetensors", dtype=wide)
    assert vectors(tmp_path / "back.safetensors") == before


def test_words_come_out_of_pivotal_tuning_and_go_into_it(tmp_path: Path) -> None:
    tuned = REAL / "040_lora_disney_inpainting.safetensors"
    inside = load_file(tuned)
    sdmerge.extract_embeddings(tuned, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert sorted(found) == ["<s1>", "<s2>"]
    assert all(samples.bits(found[word][0]) == samples.bits(inside[word]) for word in found)
    sdmerge.extract_embeddings(tuned, tmp_path / "s1.pt", word="<s1>")
    sdmerge.bundle_embeddings(
        REAL / "038_analog_svd_rank4.safetensors", [tmp_path / "s1.pt"], tmp_path / "b.safetensors", token="<s1>"
    )
    bundled: dict[str, Tensor] = load_file(tmp_path / "b.safetensors")
    assert samples.bits(bundled["<s1>"]) == samples.bits(inside["<s1>"])
    assert torch.equal(bundled["unet:0:up"], load_file(REAL / "038_analog_svd_rank4.safetensors")["unet:0:up"])
    assert samples.texts_of(tmp_path / "b.safetensors")["<s1>"] == "<embed>"


def test_a_real_vector_as_an_embedding(tmp_path: Path) -> None:
    sdmerge.convert(REAL / "097_aivazovsky.pt", tmp_path / "o.safetensors", kind="embedding")
    expected = torch.load(REAL / "097_aivazovsky.pt", weights_only=True)
    assert samples.bits(load_file(tmp_path / "o.safetensors")["emb_params"]) == samples.bits(expected)
