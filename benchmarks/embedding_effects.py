"""What methods that change embeddings do to the tiny models: the figures that `bench_embeddings` prints and the tests hold.

Every function trains on the unknown concept of `concept`, and judges by pictures and noise that training never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from benchmarks import concept
from sdmerge.sampling import Painting, denoised, noise_of
from sdmerge.train import inversion
from sdmerge.train import settings as groups
from sdmerge.train.clip import load_image_encoder
from sdmerge.train.clip_inversion import seen
from sdmerge.train.ddim import ladder
from sdmerge.train.log import Silent
from sdmerge.train.loop import Run
from sdmerge.train.losses import schedule_of
from sdmerge.train.method import find
from sdmerge.train.networks import Condition
from sdmerge.train.style import Style, read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdmerge.train.batches import Batch
    from sdmerge.train.clip import ImageEncoder
    from sdmerge.train.networks import Networks

TOKEN, INIT, COLOURS = "<diamond>", "diamond", "orange blue"
PLAIN = (INIT, *concept.shapes.COLOURS, *concept.shapes.BASE_SHAPES, "hexagon", "star", "thing", "object", "shape")
"""Words that could be meant by the concept."""
TOWER = concept.TINY / "image_tower.safetensors"


@dataclass(frozen=True)
class Judged:
    """A run that was prepared, with what it is judged by.

    Attributes:
        run: not yet trained.
        unseen: pictures of the concept that are not trained on; their captions have `concept.TOKEN` where the word stands.
        known: pictures of what the model knew.
    """

    run: Run
    unseen: Sequence[Batch]
    known: Sequence[Batch]

    def concept_loss(self, word: str) -> float:
        """Return the loss on the concept, called by a word."""
        return concept.loss(self.run.networks, self.run.objective.schedule, self.unseen, word)

    def known_loss(self) -> float:
        """Return the loss on what the model knew."""
        return concept.loss(self.run.networks, self.run.objective.schedule, self.known)

    def train(self) -> None:
        """Train, without writing anything."""
        self.run.loop(None)


def judged(method: str, model: Path, folder: Path, seed: int, *, count: int = 24, **values: Any) -> Judged:
    """Prepare a run on eight pictures of the concept.

    Args:
        method: the method's name.
        model: a diffusers folder.
        folder: where pictures are put.
        seed: decides about everything.
        count: pictures to judge by.
        values: settings.
    """
    torch.set_num_threads(1)
    data = concept.write(concept.diamonds(8, seed=1 + seed, token=TOKEN), folder / "data")
    given = {"model": str(model), "data": str(data), "output": str(folder / "out.safetensors"), "device": "cpu"}
    given |= {"batch": 4, "seed": seed} | values
    found = find(method)
    made = {name: groups.made(cls, given, found.defaults) for name, cls in groups.GROUPS.items()}
    run = Run(groups.made(found, given), groups.Settings(**made), Silent())
    run.prepare()
    unseen = concept.questions(run.networks, concept.diamonds(count, seed=99 + seed))
    return Judged(run, unseen, concept.questions(run.networks, concept.known(count, seed=50 + seed)))


def textual_inversion(
    model: Path, folder: Path, seed: int, words: Sequence[str] = PLAIN, **values: Any
) -> Mapping[str, float]:
    """Train a word: losses of the concept by the word that it began as, by the best other word, and by the new one."""
    given = {"token": TOKEN, "template": "captions", "init": COLOURS, "vectors": 8, "batch": 8, "lr": 2e-2} | values
    found = judged("textual-inversion", model, folder, seed, schedule="cosine", **given)
    began, best = found.concept_loss(given["init"]), min(found.concept_loss(word) for word in words)
    before = found.known_loss()
    found.train()
    return {
        "init word": began,
        "best word": best,
        "trained": found.concept_loss(TOKEN),
        "base data before": before,
        "base data after": found.known_loss(),
    }


def dream_artist(model: Path, folder: Path, seed: int, **values: Any) -> Mapping[str, float]:
    """Train a word and its negative: losses under guidance."""
    given = {"token": TOKEN, "template": "captions", "init": INIT, "negative_init": "<empty>", "lr": 1e-2} | values
    found = judged("dream-artist", model, folder, seed, **given)
    found.train()
    pairs = {"prompt": (INIT, ""), "positive": (TOKEN, ""), "both": (TOKEN, f"{TOKEN}-neg")}
    return {name: _guided(found, *pair) for name, pair in pairs.items()}


@torch.no_grad()
def _guided(found: Judged, word: str, negative: str, scale: float = 3.0) -> float:
    objective, total = found.run.objective, 0.0
    for batch in found.unseen:
        forward, back = (
            objective.predicted(batch, objective.condition(texts))
            for texts in (
                [text.replace(concept.TOKEN, word) for text in batch.captions],
                [negative] * len(batch.captions),
            )
        )
        total += float(objective.error(back + scale * (forward - back), batch))
    return total / len(found.unseen)


def image_encoder(model: Path) -> ImageEncoder:
    """Return the tiny models' image encoder."""
    settings = groups.ModelSettings(model=str(model), model_config=str(concept.TINY / "config"))
    return load_image_encoder(str(TOWER), settings)


def aesthetic(
    networks: Networks, encoder: ImageEncoder, seed: int, turns: Sequence[int] = (0, 5), *, rate: float = 1e-4
) -> Mapping[str, float]:
    """Paint with a text encoder moved toward pictures of one colour and background: how near the paintings are to them."""
    shapes = concept.shapes
    rng = np.random.default_rng(seed)
    colour, ground = rng.choice(list(shapes.COLOURS)), rng.choice(list(shapes.BACKGROUNDS))
    scenes = [shapes.with_words(shapes.sample(rng), colour=colour, background=ground) for _ in range(16)]
    drawn = torch.from_numpy(shapes.draw(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    embedding = encoder.features(drawn).mean(0)
    others = [one for one in shapes.COLOURS if one != colour]
    prompts = [f"a large {one} {shape}" for one, shape in zip(others, shapes.BASE_SHAPES, strict=False)]
    found = {}
    for steps in turns:
        style = Style(embedding=embedding, projection=encoder.text_projection, steps=steps, rate=rate)
        told = Condition.stacked([read(networks, prompt, style) for prompt in prompts])
        with torch.no_grad():
            latents = _painted(networks, told, seed)
            near = cosine_similarity(encoder.features(networks.decode(latents)), embedding[None])
        found[f"T = {steps}"] = float(near.mean())
    return found


def _painted(networks: Networks, told: Condition, seed: int) -> Tensor:
    painting = Painting(steps=15, guidance=4.5)
    noise = torch.cat([noise_of(networks, seed + i, painting) for i in range(len(told.context))])
    against = Condition(networks.read([""]).context.expand_as(told.context))
    return denoised(networks, told, against, noise, painting)


def null_text(networks: Networks, seed: int, *, steps: int = 50, **how: Any) -> Mapping[str, float]:
    """Invert a picture and paint it again: PSNR against what the autoencoder makes of it, in dB."""
    picture = concept.known(1, seed=100 + seed)[0]
    latents = concept.latents_of(networks, [picture])
    schedule = schedule_of(networks.scheduler, groups.LossSettings(), "auto")
    levels = ladder(schedule, networks.scheduler, steps)
    with torch.no_grad():
        told, empty = networks.read([picture.caption]), networks.read([""])
        way = inversion.inverted(networks, levels, latents, told)
    nulls = inversion.optimised(networks, levels, way, told, empty, guidance=7.5, **how)
    wanted = networks.decode(latents)

    def closeness(against: Condition | Sequence[Condition], guidance: float) -> float:
        painted = denoised(networks, told, against, way[-1], Painting(steps=steps, guidance=guidance))
        return float(10 * torch.log10(4 / ((networks.decode(painted) - wanted) ** 2).mean()))

    with torch.no_grad():
        return {
            "DDIM, 7.5": closeness(empty, 7.5),
            "DDIM, 1": closeness(empty, 1.0),
            "negative prompt, 7.5": closeness(told, 7.5),
            "null text, 7.5": closeness(nulls, 7.5),
        }


def clip_inversion(model: Path, folder: Path, seed: int, **values: Any) -> Mapping[str, float]:
    """Train an image embedding: losses of the concept by the pictures' mean embedding, by nothing, and by the new one."""
    given = {"clip": str(TOWER), "model_config": str(concept.TINY / "config"), "lr": 1e-1} | values
    found = judged("clip-inversion", model, folder, seed, **given)
    (vector,) = found.run.trained.parameters.values()
    mean = vector.detach().clone()
    found.train()

    @torch.no_grad()
    def loss(vectors: Tensor) -> float:
        objective = found.run.objective
        return sum(
            float(objective.denoising(batch, seen(vectors, len(batch.captions)))) for batch in found.unseen
        ) / len(found.unseen)

    return {"mean embedding": loss(mean), "zeros": loss(torch.zeros_like(mean)), "trained": loss(vector.detach())}


EFFECTS: Mapping[str, Callable[..., Mapping[str, float]]] = {
    "textual-inversion": textual_inversion,
    "dream-artist": dream_artist,
    "aesthetic": aesthetic,
    "null-text": null_text,
    "clip-inversion": clip_inversion,
}
