"""Null-text inversion: guided sampling paints the picture again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import concept, embedding_effects
from sdformats.errors import OutputExists
from sdmerge import contact_sheet, train
from sdmerge.applied import Applied, Files, apply
from sdmerge.errors import RequestError
from sdmerge.sampling import Painting
from sdmerge.train.data import DataProblems
from sdmerge.train.loading import load
from sdmerge.train.log import Silent
from sdmerge.train.settings import ModelSettings

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "a large red heart in the center, cream background"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = concept.known(1, seed=4)[0]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(drawn.pixels).save(path)
    path.with_suffix(".txt").write_text(drawn.caption, encoding="utf-8")
    return path


def test_it_is_far_nearer_than_plain_inversion(toy: Path) -> None:
    networks = load(ModelSettings(model=str(toy)))
    found = embedding_effects.null_text(networks, 0, steps=15, inner=15, tolerance=1e-6)
    assert found["null text, 7.5"] > found["DDIM, 7.5"] + 10
    assert found["null text, 7.5"] >= found["negative prompt, 7.5"]
    assert found["negative prompt, 7.5"] == pytest.approx(found["DDIM, 1"], abs=0.05)


def test_the_file_paints_the_picture_again(toy: Path, photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "inversion.safetensors"
    caption = photo.with_suffix(".txt").read_text(encoding="utf-8")
    given = {"image": str(photo), "prompt": caption, "steps": 12, "variant": "negative-prompt"}
    train.run("null-text", model=str(toy), output=str(file), **given)
    assert Files(null_text=file).prompt == caption
    request = contact_sheet.Request(
        model=ModelSettings(model=str(toy)),
        output=tmp_path / "again.png",
        prompts=(caption,),
        seeds=(0,),
        painting=Painting(),
        files=Files(null_text=file),
    )
    networks = load(request.model)
    beside = apply(request.files, networks, request.model)
    assert beside.changed(Painting(steps=3, scheduler="euler")) == Painting(steps=12, guidance=7.5, scheduler="ddim")
    from sdmerge.sampling import paint

    (again,) = paint(networks, [caption], [0], Painting(), applied=beside)
    wrong = np.abs(np.asarray(again, dtype=float) - np.asarray(Image.open(photo), dtype=float)).mean()
    (other,) = paint(networks, [caption], [0], Painting(steps=12, guidance=7.5))
    assert wrong < 0.5 * np.abs(np.asarray(other, dtype=float) - np.asarray(Image.open(photo), dtype=float)).mean()
    assert contact_sheet.sample(request, Silent()) == (1, 1)
    with pytest.raises(OutputExists):
        train.run("null-text", model=str(toy), output=str(file), **given)


@pytest.mark.parametrize(("variant", "told"), [("ddim", ""), ("negative-prompt", PROMPT)])
def test_what_needs_no_training_takes_one_text_for_every_step(
    variant: str, told: str, toy: Path, photo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "inversion.safetensors"
    given = {"image": str(photo), "prompt": PROMPT, "steps": 3, "variant": variant}
    train.run("null-text", model=str(toy), output=str(file), **given)
    networks = load(ModelSettings(model=str(toy)))
    found = apply(Files(null_text=file), networks, ModelSettings(model=str(toy)))
    expected = networks.read([told]).context
    assert len(found.nulls) == 3
    assert all(torch.equal(null.context, expected) for null in found.nulls)


def test_the_communitys_file_has_no_noise(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "nulls.pt"
    torch.save([torch.full((1, 77, 48), float(i)) for i in range(5)], file)
    networks = load(ModelSettings(model=str(toy)))
    found = apply(Files(null_text=file), networks, ModelSettings(model=str(toy)))
    assert [float(null.context.mean()) for null in found.nulls] == [0, 1, 2, 3, 4]
    assert found.noise is None
    assert "holds no noise" in found.notes[0]
    assert Applied().notes == ()


def test_what_is_wrong_is_told(toy: Path, photo: Path, tmp_path: Path) -> None:
    given = {"model": str(toy), "prompt": "a heart", "output": str(tmp_path / "o.safetensors")}
    with pytest.raises(DataProblems, match="cannot be read as a picture"):
        train.run("null-text", image=str(photo.with_suffix(".txt")), **given)
    with pytest.raises(RequestError, match="no setting of this method"):
        train.run("null-text", image=str(photo), batch=3, **given)
    with pytest.raises(RequestError, match="image is missing"):
        train.run("null-text", **given)
