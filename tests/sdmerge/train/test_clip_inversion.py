"""CLIP inversion and the model that it needs: told pictures in place of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import concept, embedding_effects
from sdformats.clip_inversion import read_clip_inversion
from sdformats.files import open_source
from sdmerge.applied import Files, apply
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.sampling import Painting, paint
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

VARIATION = concept.TINY / "tiny-image-variation.safetensors"
GIVEN: dict[str, Any] = {"clip": str(embedding_effects.TOWER), "model_config": str(concept.TINY / "config")}


@pytest.mark.skipif(not VARIATION.exists(), reason="the tiny image-variation model is not here")
def test_a_vector_learns_the_concept(tmp_path: Path) -> None:
    found = embedding_effects.clip_inversion(VARIATION, tmp_path, 0, steps=60)
    assert found["trained"] < 0.9 * min(found["mean embedding"], found["zeros"])


def test_the_file_is_what_was_trained_and_paints(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "concept.safetensors"
    run = runs.trained("clip-inversion", toy, diamonds, output, steps=2, **GIVEN)
    with open_source(output) as source:
        assert torch.equal(value(read_clip_inversion(source).vectors), run.trained.parameters["clip_image"])
        assert str(concept.TINY) not in str(source.metadata)  # names only: a file must not tell about its maker's disk
    settings = ModelSettings(model=str(toy))
    networks = load(settings)
    beside = apply(Files(image=output), networks, settings)
    one, other = (
        paint(networks, [prompt], [0], Painting(steps=2), applied=beside)[0]
        for prompt in ("a red heart", "a blue moon")
    )
    assert one.tobytes() == other.tobytes()


def test_it_begins_as_asked(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    start = torch.randn(48)
    torch.save(start, tmp_path / "style.pt")
    for init, wanted in ((str(tmp_path / "style.pt"), start), ("zeros", torch.zeros(48))):
        run = runs.new("clip-inversion", toy, diamonds, tmp_path / "o.safetensors", init=init, overwrite=True, **GIVEN)
        run.prepare()
        assert torch.equal(run.trained.parameters["clip_image"].detach()[0], wanted)
    torch.save(torch.randn(40), tmp_path / "style.pt")
    run = runs.new(
        "clip-inversion",
        toy,
        diamonds,
        tmp_path / "o.safetensors",
        init=str(tmp_path / "style.pt"),
        overwrite=True,
        **GIVEN,
    )
    with pytest.raises(RequestError, match="40 wide, and the model is conditioned on 48"):
        run.prepare()


def test_a_model_learns_to_be_told_pictures(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    run = runs.new("image-variation", toy, diamonds, tmp_path / "o.safetensors", steps=2, lr=1e-3, untold=0.5, **GIVEN)
    run.prepare()
    batch = run.sources[0](0)
    told = run.objective.told
    assert told is not None
    contexts = torch.cat([told(batch).context for _ in range(40)])
    untold = contexts.flatten(1).abs().sum(1) == 0
    assert 0.3 < float(untold.float().mean()) < 0.7
    encoder = embedding_effects.image_encoder(toy)
    wanted = {tuple(row.tolist()) for row in encoder.features_of(batch.pictures)}
    assert {tuple(row[0].tolist()) for row in contexts[~untold]} == wanted
    run.loop(None)
    run.finish()
    assert (
        runs.painted(
            load(ModelSettings(model=str(tmp_path / "o.safetensors"), model_config=str(concept.TINY / "config")))
        )
        - runs.painted(run.networks)
    ).abs().max() < 1e-5
