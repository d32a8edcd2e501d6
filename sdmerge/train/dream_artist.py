"""DreamArtist: a word for what the pictures show and one for what they don't, trained together (Dong et al. 2022).

Prediction: e⁻ + g (e⁺ - e⁻), where e⁺ is told the word and e⁻ its negative, as sampling with both combines them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import Trained
from sdmerge.train.textual_inversion import WordTraining, attached, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Parameter

    from sdmerge.execute import Report
    from sdmerge.train.batches import Batch
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.objective import Objective
    from sdmerge.train.settings import Settings

_NUMBER = r"\d+(?:\.\d*)?"
_GUIDANCE = re.compile(rf"({_NUMBER})(?:-({_NUMBER}):(ln|cos|cos2))?")
_NOISE = 1e-3
"""By how much equal negative vectors begin apart."""


@dataclass(frozen=True, kw_only=True)
class DreamArtist(WordTraining):
    """Two words trained together through guidance: use the one in the prompt, the other in the negative prompt."""

    name: ClassVar[str] = "dream-artist"
    title: ClassVar[str] = "DreamArtist: a word and its negative."
    defaults: ClassVar[dict[str, Any]] = {"lr": 3e-3, "weight_decay": 0.0, "clip_norm": 1.0, "steps": 8000}

    init: Annotated[str, Param("what the positive vectors begin as: words, <random> or <zeros>")] = "<random>"
    negative_init: Annotated[str, Param("what the negative vectors begin as")] = "<random>"
    vectors: Annotated[int, Param("how many vectors the word has", 1, 75)] = 3
    negative_vectors: Annotated[int, Param("how many vectors its negative has", 1, 75)] = 6
    scale: Annotated[
        str, Param("guidance: a number, or LOW-HIGH:ln, :cos or :cos2, growing with the noise in that curve")
    ] = "3"
    alone: Annotated[
        float, Param("leave the negative empty with this probability, so that the word is good without it too", 0, 1)
    ] = 0.25
    reconstruction: Annotated[float, Param("add the L1 distance of decoded pictures, times this", 0)] = 0.0

    @property
    def negative(self) -> str:
        """The negative word."""
        return f"{self.token}-neg"

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        import torch

        from sdmerge.train.words import starting

        guidance(self.scale)  # refuses what is no scale
        vectors: dict[str, Parameter] = {}
        sides = ((self.token, self.init, self.vectors), (self.negative, self.negative_init, self.negative_vectors))
        for token, init, count in sides:
            starts = {f"te{i}": starting(text, init, count) for i, text in enumerate(networks.texts, 1)}
            if token == self.negative:
                starts = {name: start + _NOISE * torch.randn(start.shape) for name, start in starts.items()}
            side = "negative" if token == self.negative else "positive"
            vectors |= {f"{name}.{side}": one for name, one in attached(networks, token, starts).items()}
        return Trained(vectors, reads_texts=True, state=state_of(self, networks, vectors, settings.optimizer.lr))

    def loss(self, objective: Objective, batch: Batch) -> Tensor:
        import torch

        forward = objective.predicted(batch)
        drawn = torch.rand(len(batch.captions)).tolist()
        against = ["" if one < self.alone else self.negative for one in drawn]
        back = objective.predicted(batch, objective.condition(against))
        share = batch.when.to(forward.dtype) / (objective.schedule.steps - 1)
        scale = guidance(self.scale)(share).reshape(-1, 1, 1, 1)
        predicted = back + scale * (forward - back)
        loss = objective.error(predicted, batch)
        if not self.reconstruction:
            return loss
        noisy = objective.schedule.noisy(batch.latents, batch.noise, batch.when)
        clean = objective.schedule.clean(noisy, predicted, batch.when)
        with torch.no_grad():
            wanted = objective.networks.decode(batch.latents)
        return loss + self.reconstruction * (objective.networks.decode(clean) - wanted).abs().mean()

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from dataclasses import replace

        from sdmerge.train.saving import texts_of
        from sdmerge.train.saving_words import save_word

        texts = texts_of(self, settings, saving)
        reports = []
        for side, token in (("positive", self.token), ("negative", self.negative)):
            vectors = {
                name.removesuffix(f".{side}"): one for name, one in trained.parameters.items() if name.endswith(side)
            }
            target = saving.target
            if side == "negative":
                target = target.with_name(f"{target.stem}-neg{target.suffix}")
            where = replace(saving, target=target)
            reports.append(save_word(token, vectors, networks.family, self.to, settings, texts, where))
        return reports


def guidance(text: str) -> Callable[[Tensor], Tensor]:
    """Return the scale of guidance as a function of how far along the noise a step is, 0..1.

    ``LOW-HIGH:ln`` is LOW + (HIGH - LOW) r; ``cos`` has sin(πr/2) in r's place, ``cos2`` 1 - cos(πr/2).

    Raises:
        RequestError: the text says no scale.
    """
    import math

    import torch

    match = _GUIDANCE.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"scale is {text!r} (expected a number, or LOW-HIGH:ln, :cos or :cos2)")
    low = float(match[1])
    high, curve = float(match[2] or low), match[3] or "ln"
    curves: dict[str, Callable[[Tensor], Tensor]] = {
        "ln": lambda r: r,
        "cos": lambda r: torch.sin(r * (math.pi / 2)),
        "cos2": lambda r: 1 - torch.cos(r * (math.pi / 2)),
    }
    return lambda share: low + (high - low) * curves[curve](share)


METHOD = DreamArtist
