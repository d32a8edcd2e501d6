"""From pictures to what a step is computed from: latents, captions, noise, and which steps of the noise.

Everything random about a batch follows from the seed and the batch's number. It is drawn for all devices together, and each
takes its part; so a run on two devices sees what a run on one with a batch twice as large sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import torch

from sdmerge.train import data
from sdmerge.train.buckets import Order, draws, permuted, size_for, sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdmerge.train.method import LoopMethod
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import DataSettings, LossSettings

_MIDDLE = (0.5, 0.5)


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from.

    Attributes:
        latents: [n, 4, height, width], scaled as the UNet sees them.
        captions: n texts.
        noise: [n, 4, height, width].
        when: [n] steps of the noise.
        sizes: [n, 6] for SDXL; see `Networks.predict`.
        mask: [n, 1, height, width], where the loss is masked.
        pictures: the n files.
    """

    latents: Tensor
    captions: tuple[str, ...]
    noise: Tensor
    when: Tensor
    sizes: Tensor
    mask: Tensor | None = None
    pictures: tuple[Path, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        moved = (one.to(device) for one in (self.noise, self.when, self.sizes))
        latents = self.latents.to(device)
        noise, when, sizes = moved
        return Batch(latents, self.captions, noise, when, sizes, mask, self.pictures)


@dataclass(frozen=True)
class _Encoded:
    """A picture's latents.

    Attributes:
        mean, spread: [4, height, width].
        mask: [1, height, width].
        sizes: height and width of the original, top and left of the cut, height and width wanted.
    """

    mean: Tensor
    spread: Tensor
    mask: Tensor
    sizes: tuple[int, ...]


@dataclass
class Source:
    """Batches of one folder's pictures.

    Attributes:
        items: the pictures.
        weight: what the loss of these pictures is multiplied with.
        batch: pictures for each device.
        place, places: which device this is, of how many.
        method: says how pictures are shown, and what is said about them; None: as they are.
    """

    items: Sequence[data.Item]
    networks: Networks
    settings: DataSettings
    loss: LossSettings
    batch: int
    seed: int
    weight: float = 1.0
    place: int = 0
    places: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    method: LoopMethod | None = None

    def __post_init__(self) -> None:
        side = self.settings.resolution or self.networks.resolution
        step = self.settings.bucket_step
        choices = sizes(side, step) if self.settings.buckets else ((side, side),)
        self._wanted = [size_for(item.size, choices) for item in self.items]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (item, size) in enumerate(zip(self.items, self._wanted, strict=True)):
            groups.setdefault(size, []).extend([index] * item.repeats)
        self.groups = dict(sorted(groups.items()))
        self.order = Order(list(self.groups.values()), self.batch * self.places, self.seed)
        self._kept: dict[tuple[int, int, bool], _Encoded] = {}
        self._variants = 1 if self.method is None else self.method.variants()
        self._masked = self.settings.masked or self._variants > 1

    @property
    def cached(self) -> bool:
        """Whether pictures are encoded once and for all."""
        return self.settings.cache_latents and not self.settings.random_crop

    def encode_all(self, advance: Callable[[int], None]) -> None:
        """Encode every picture, mirrored ones too, where they are cached."""
        if not self.cached:
            return
        for index in range(len(self.items)):
            mirrored = (False, True) if self.settings.flip else (False,)
            for variant, flip in product(range(self._variants), mirrored):
                self._kept[index, variant, flip] = self._encoded(index, variant, flip, _MIDDLE)
            advance(1)

    def notes(self) -> list[str]:
        """Say what was decided about the pictures."""
        found = [f"{len(self.items):,} pictures, brought to {len(self.groups):,} size{'s' * (len(self.groups) > 1)}"]
        for size, wanted in (("x".join(map(str, size)), group) for size, group in self.groups.items()):
            found.append(f"{size}: {len(set(wanted)):,} pictures")
        small = sum(item.size[0] < w or item.size[1] < h for item, (w, h) in zip(self.items, self._wanted, strict=True))
        if small:
            found.append(f"{small:,} pictures are smaller than they are trained at, and were enlarged")
        long = [item for item in self.items if any(text.is_too_long(item.caption) for text in self.networks.texts)]
        if long:
            found.append(
                f"{len(long):,} captions are longer than the text encoder reads, and are cut: {long[0].path.name} …"
            )
        return found

    def __call__(self, number: int) -> Batch:
        """Return a batch, by its number from the run's beginning, on the CPU."""
        chosen = self.order(number)
        source = draws(self.seed, number, 1)
        count = len(chosen)
        mirrored = (torch.rand(count, generator=source) < 0.5) & self.settings.flip
        dropped = torch.rand(count, generator=source) < self.settings.caption_dropout
        variants = torch.randint(self._variants, (count,), generator=source).tolist()
        captions = [self._caption(index, variant, source) for index, variant in zip(chosen, variants, strict=True)]
        mine = slice(self.place * self.batch, (self.place + 1) * self.batch)
        cuts = torch.rand(count, 2, generator=source).tolist()
        seen = list(zip(chosen, variants, mirrored.tolist(), cuts, strict=True))[mine]
        found = [
            self._kept.get((i, variant, flip)) or self._encoded(i, variant, flip, cut) for i, variant, flip, cut in seen
        ]
        shape = (count, *found[0].mean.shape)
        latents = torch.stack([one.mean for one in found])
        if self.settings.sample_latents:
            drawn = torch.randn(shape, generator=source)[mine]
            latents = latents + drawn * torch.stack([one.spread for one in found])
        noise = torch.randn(shape, generator=source)
        if self.loss.noise_offset:
            noise = noise + self.loss.noise_offset * torch.randn(*shape[:2], 1, 1, generator=source)
        when = torch.randint(self.loss.min_timestep, self.loss.max_timestep, (count,), generator=source)
        texts = tuple("" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True))
        return Batch(
            latents=latents,
            captions=texts[mine],
            noise=noise[mine],
            when=when[mine],
            sizes=torch.tensor([one.sizes for one in found], dtype=torch.float32),
            mask=torch.stack([one.mask for one in found]) if self._masked else None,
            pictures=tuple(self.items[index].path for index in chosen[mine]),
        )

    def _caption(self, index: int, variant: int, source: torch.Generator) -> str:
        text = self.items[index].caption
        if self.method is not None:
            text = self.method.caption(text, variant, source)
        if not self.settings.shuffle_captions:
            return text
        parts = [part.strip() for part in text.split(",")]
        return ", ".join(permuted(parts, self.settings.keep_tokens, source))

    def _encoded(self, index: int, variant: int, mirrored: bool, cut: Sequence[float]) -> _Encoded:
        item, size = self.items[index], self._wanted[index]
        try:
            picture = data.opened(item.path)
        except data.UnreadablePicture as error:  # it was readable when the run began
            raise data.DataProblems([f"{item.path}: {error}"]) from error
        if self.method is not None:
            picture = self.method.vary(picture, variant)
        place = cut if self.settings.random_crop else _MIDDLE
        values, alpha, (top, left) = data.pixels(picture, size, (place[0], place[1]))
        if mirrored:
            values, alpha = values.flip(-1), alpha.flip(-1)
        mean, spread = self.networks.encode(values[None].to(self.device))
        mask = torch.nn.functional.adaptive_avg_pool2d(alpha[None], (mean.shape[-2], mean.shape[-1]))[0]
        # SDXL's conditioning: the original's height and width, what is cut at the top and left, the size wanted
        return _Encoded(mean[0].cpu(), spread[0].cpu(), mask, (item.size[1], item.size[0], top, left, size[1], size[0]))
