"""Textual inversion: a new word for what the pictures show; the model itself stays as it is (Gal et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Part, Trained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor
    from torch.nn import Parameter

    from sdmerge.execute import Report
    from sdmerge.train.data import Item
    from sdmerge.train.log import Tell
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

NORMS = ("fixed", "free", "decay")


@dataclass(frozen=True, kw_only=True)
class WordTraining(LoopMethod):
    """What methods that train words have in common: templates, and the length of vectors."""

    token: Annotated[str, Param("the new word, as it stands in captions and prompts")]
    template: Annotated[
        str, Param("sentences to train with: object, style, captions (which hold the word), or a text file of them")
    ] = "object"
    norm: Annotated[
        str, Param("length of the vectors: kept, free, or drawn to that of the model's words", choices=NORMS)
    ] = "fixed"
    to: Annotated[str | None, Param("the layout to write; `sdmerge layouts` lists them")] = None

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences to train with."""
        from sdmerge.train.templates import templates

        return templates(self.template)

    def parts(self, settings: Settings, networks: Networks, tell: Tell) -> tuple[Part, ...]:
        from pathlib import Path

        told = any("{caption}" in sentence for sentence in self.sentences)
        return (Part(Path(settings.data.data), settings.data.caption if told else settings.data.caption or ""),)

    def check(self, items: Sequence[Item]) -> None:
        from sdmerge.train.data import DataProblems

        if all("{}" in sentence for sentence in self.sentences):
            return
        lacking = [item.path for item in items if self.token not in item.caption]
        if lacking:
            advice = f"expected {self.token} in every caption, or a --template with {{}} where it stands"
            raise DataProblems([f"{path}: its caption lacks the word ({advice})" for path in lacking])

    def caption(self, text: str, variant: int, source: torch.Generator) -> str:
        from sdmerge.train.templates import filled

        return filled(self.sentences, self.token, text, source)

    def after_step(self, trained: Trained) -> None:
        for name, parameter in trained.parameters.items():
            keep_length(parameter, trained.state.lengths.get(name), trained.state.pull)

    def figures(self, trained: Trained) -> dict[str, float]:
        import torch

        lengths = torch.cat(
            [torch.linalg.vector_norm(one.detach(), dim=1).cpu() for one in trained.parameters.values()]
        )
        return {"norm": round(float(lengths.mean()), 4)}


@dataclass(frozen=True)
class WordState:
    """What is kept beside the vectors.

    Attributes:
        lengths: by parameter, [count, 1]: how long the vectors are kept, or what they are drawn to.
        pull: the part of the way there that is gone in each step.
    """

    lengths: Mapping[str, Tensor]
    pull: float


def keep_length(vectors: Parameter, wanted: Tensor | None, pull: float) -> None:
    """Bring vectors [count, width] nearer to a length: n ← n + pull (wanted - n)."""
    import torch

    if wanted is None:
        return
    with torch.no_grad():
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        aim = lengths + pull * (wanted.to(lengths) - lengths)
        vectors.mul_(torch.where(lengths > 0, aim / lengths, 1.0))


def attached(networks: Networks, token: str, starts: Mapping[str, Tensor]) -> dict[str, Parameter]:
    """Give a word vectors that are trained. Returns them by text encoder."""
    from torch.nn import Parameter

    found = {name: Parameter(start) for name, start in starts.items()}
    for text, vectors in zip(networks.texts, found.values(), strict=True):
        text.add_word(token, vectors)
    return found


def state_of(method: WordTraining, networks: Networks, vectors: Mapping[str, Parameter], rate: float) -> WordState:
    """Return how long vectors are kept, by the method's `norm`.

    ``fixed`` keeps each vector's own length, and that of the model's words where it began as zeros. ``decay`` goes to the
    latter by min(1, 100 · rate) of the way, as pivotal tuning does.
    """
    import torch

    from sdmerge.train.words import usual_length

    lengths = {}
    for name, parameter in vectors.items():
        usual = usual_length(networks.texts[int(name[2]) - 1])
        own = torch.linalg.vector_norm(parameter.detach(), dim=1, keepdim=True)
        lengths[name] = torch.full_like(own, usual) if method.norm == "decay" else own.where(own > 0, usual)
    if method.norm == "free":
        lengths = {}
    return WordState(lengths, 1.0 if method.norm == "fixed" else min(1.0, 100 * rate))


@dataclass(frozen=True, kw_only=True)
class TextualInversion(WordTraining):
    """Vectors for a new word, trained through the frozen model: the smallest thing that can be taught."""

    name: ClassVar[str] = "textual-inversion"
    title: ClassVar[str] = "Textual inversion: a new word."
    defaults: ClassVar[dict[str, Any]] = {"lr": 5e-3, "weight_decay": 0.0}

    init: Annotated[str, Param("what the vectors begin as: words, <random> or <zeros>")] = "<random>"
    vectors: Annotated[int, Param("how many vectors the word has", 1, 75)] = 1

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from sdmerge.train.words import starting

        starts = {f"te{i}": starting(text, self.init, self.vectors) for i, text in enumerate(networks.texts, 1)}
        found = attached(networks, self.token, starts)
        state = state_of(self, networks, found, settings.optimizer.lr)
        return Trained(found, reads_texts=True, state=state)

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdmerge.train.saving import texts_of
        from sdmerge.train.saving_words import save_word

        texts = texts_of(self, settings, saving)
        return [save_word(self.token, trained.parameters, networks.family, self.to, settings, texts, saving)]


METHOD = TextualInversion
