"""Batches: everything random follows from the seed and the number, and devices share what one would see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sdmerge.train import data
from sdmerge.train.batches import Source
from sdmerge.train.settings import DataSettings, LossSettings

if TYPE_CHECKING:
    from pathlib import Path


class Networks:
    """Encodes a picture as its means over squares of 8 pixels, with a fourth channel, and counts how often."""

    factor, resolution, texts = 8, 64, ()

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += 1
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        means = torch.cat([means, means[:, :1]], 1)
        return means, torch.full_like(means, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, size in enumerate([(64, 64), (96, 40), (40, 96), (64, 64), (70, 60), (200, 100)]):
        image = Image.new("RGBA", size, (40 * i, 0, 0, 255))
        image.paste((255, 255, 255, 0), (0, 0, size[0] // 2, size[1]))
        image.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"one, two, three, number {i}")
    return tmp_path


def source(folder: Path, loss: LossSettings | None = None, **changes: Any) -> Source:
    placed = {name: changes.pop(name) for name in ("batch", "place", "places", "seed") if name in changes}
    settings = DataSettings(data=str(folder), bucket_step=16, **changes)
    given = {"batch": 2, "seed": 3, **placed}
    made = Source(data.find(folder), Networks(), settings, loss or LossSettings(), **given)  # type: ignore[arg-type]
    made.encode_all(lambda _: None)
    return made


def test_pictures_keep_their_shape_and_batches_have_one(folder: Path) -> None:
    found = source(folder)
    assert set(found.groups) >= {(64, 64), (96, 32), (32, 112)} or len(found.groups) >= 3
    for number in range(2 * found.order.round):
        batch = found(number)
        assert batch.latents.shape == batch.noise.shape
        assert len(batch.captions) == len(batch.when) == 2
        height, width = batch.latents.shape[-2:]
        assert batch.sizes[:, 4:].tolist() == [[8 * height, 8 * width]] * 2
    assert source(folder, buckets=False).groups.keys() == {(64, 64)}


def test_a_number_gives_the_same_batch_again_and_others_give_others(folder: Path) -> None:
    changes = {"flip": True, "random_crop": True, "shuffle_captions": True, "caption_dropout": 0.5}
    one, other = source(folder, **changes), source(folder, **changes)
    other(5)
    for number in (0, 7, 2):
        first, second = one(number), other(number)
        assert first.captions == second.captions
        for name in ("latents", "noise", "when", "sizes"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(one(0).noise, one(1).noise) or one(0).noise.shape != one(1).noise.shape
    assert not torch.equal(one(0).when, source(folder, seed=4, **changes)(0).when)


def test_devices_share_what_one_would_see(folder: Path) -> None:
    changes = {"flip": True, "random_crop": True, "shuffle_captions": True, "caption_dropout": 0.3, "masked": True}
    whole = source(folder, batch=4, **changes)
    parts = [source(folder, batch=2, place=place, places=2, **changes) for place in (0, 1)]
    for number in range(4):
        batch, halves = whole(number), [part(number) for part in parts]
        assert batch.captions == halves[0].captions + halves[1].captions
        for name in ("latents", "noise", "when", "sizes", "mask"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(half, name) for half in halves])), name


def test_pictures_are_encoded_once_unless_they_cannot_be(folder: Path) -> None:
    kept = source(folder, flip=True)
    for number in range(6):
        kept(number)
    assert kept.networks.encoded == 12  # type: ignore[attr-defined]
    for changes in ({"cache_latents": False}, {"random_crop": True}):
        again = source(folder, **changes)
        again(0)
        again(0)
        assert again.networks.encoded == 4  # type: ignore[attr-defined]


def test_captions_are_dropped_and_shuffled(folder: Path) -> None:
    texts = [text for number in range(40) for text in source(folder, caption_dropout=0.5)(number).captions]
    assert 20 < sum(not text for text in texts) < 60
    shuffled = source(folder, shuffle_captions=True, keep_tokens=1)
    texts = [text for number in range(20) for text in shuffled(number).captions]
    assert all(text.startswith("one, ") and sorted(text.split(", "))[1:3] == ["one", "three"] for text in texts)
    assert len({text.replace(text[-1], "") for text in texts}) > 2


def test_masks_noise_offset_latents_and_steps(folder: Path) -> None:
    batch = source(folder, masked=True, buckets=False, sample_latents=False)(0)
    assert batch.mask is not None
    assert batch.mask[..., :3].max() == 0  # the column beside the border is blurred by scaling
    assert batch.mask[..., 5:].min() == 1
    drawn = source(folder, buckets=False)(0)
    assert source(folder)(0).mask is None
    assert 0.2 < float((drawn.latents - batch.latents).std()) < 0.8
    offset = source(folder, LossSettings(noise_offset=0.9), buckets=False)
    means = torch.cat([offset(number).noise.mean((2, 3)).flatten() for number in range(30)])
    assert 0.7 < float(means.std()) < 1.1
    late = source(folder, LossSettings(min_timestep=300, max_timestep=310))
    when = torch.cat([late(number).when for number in range(30)])
    assert (int(when.min()), int(when.max())) == (300, 309)


def test_what_was_decided_is_told(folder: Path) -> None:
    Image.new("RGB", (20, 20)).save(folder / "6.png")
    (folder / "6.txt").write_text("tiny")
    notes = "\n".join(source(folder).notes())
    assert "7 pictures, brought to 4 sizes" in notes
    assert "2 pictures are smaller" in notes
