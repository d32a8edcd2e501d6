"""Custom Diffusion: keys and values of the cross-attention, and vectors of new words; pictures of the class beside.

Source: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion" (2023). As there, the keys and values of a
text's first token are not trained, and pictures may be shown smaller and larger, with words that say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import Trained
from sdmerge.train.prior import WithPrior

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Linear, Parameter

    from sdmerge.execute import Report
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

_SCALES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1.0, ("",)),
    (0.7, ("",)),
    (0.4, ("a far away ", "very small ")),
    (1.3, ("zoomed in ", "close up ")),
)
"""Sizes that a picture is shown in, and words that stand before its caption."""


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion(WithPrior):
    """Keys and values of the cross-attention, and vectors of new words, on a few pictures beside pictures of the class.

    Captions name the thing by its new word, as 'a <new1> dog'; one for all of them is given with --caption.
    """

    name: ClassVar[str] = "custom-diffusion"
    title: ClassVar[str] = "Custom Diffusion: keys and values of the cross-attention, and new words."
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-5, "steps": 500}

    words: Annotated[tuple[str, ...], Param("a new word; may be given several times")] = ("<new1>",)
    init: Annotated[tuple[str, ...], Param("the word that each of them begins as")] = ("ktn",)
    rescale: Annotated[bool, Param("show pictures smaller and larger, too, with words that say so")] = False
    rank: Annotated[int, Param("write changes as factors of this rank; 0: whole weights", 0)] = 0
    to: Annotated[str, Param("the layout to write", choices=("delta", "original", "diffusers"))] = "delta"

    def variants(self) -> int:
        return len(_SCALES) if self.rescale else 1

    def vary(self, picture: Image, variant: int) -> Image:
        from PIL import Image

        scale = _SCALES[variant][0]
        if scale == 1:
            return picture
        size = (round(picture.width / scale), round(picture.height / scale))
        left, top = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
        if scale > 1:
            return picture.crop((-left, -top, size[0] - left, size[1] - top))
        around = Image.new("RGBA", size, (127, 127, 127, 0))
        around.paste(picture, (left, top))
        return around

    def caption(self, text: str, variant: int, source: torch.Generator) -> str:
        words = _SCALES[variant][1]
        if len(words) == 1:
            return words[0] + text
        import torch

        return words[int(torch.randint(len(words), (), generator=source))] + text

    def attach(self, networks: Networks, settings: Settings) -> Trained:
        from torch.nn import Parameter

        from sdmerge.train.inject import layers

        if len(self.init) not in (1, len(self.words)):
            raise RequestError(
                f"{len(self.init)} words to begin as for {len(self.words)} new ones (expected one for each)"
            )
        parameters: dict[str, Parameter] = {}
        for i, word in enumerate(self.words):
            for number, text in enumerate(networks.texts, 1):
                start = text.vectors(self.init[min(i, len(self.init) - 1)])[:1]
                vector = Parameter(start.clone())
                text.add_word(word, vector)
                parameters[f"te{number}.{word}"] = vector
        before = {}
        for path, layer in layers(networks.unet):
            if path.endswith((".attn2.to_k", ".attn2.to_v")):
                before[f"{path}.weight"] = layer.weight.detach().clone() if self.rank else None
                layer.weight.requires_grad_(True)
                layer.forward = _first_token_kept(layer)  # type: ignore[method-assign, assignment, arg-type]
                weight = layer.weight
                assert isinstance(weight, Parameter), "a layer's weight is one"
                parameters[f"unet.{path}.weight"] = weight
        return Trained(parameters, reads_texts=True, state=before)

    def save(self, trained: Trained, networks: Networks, settings: Settings, saving: Saving) -> list[Report]:
        from sdformats.custom_diffusion.delta import CustomDiffusion as Delta
        from sdformats.custom_diffusion.write import WRITERS
        from sdmerge.train.saving import dtype_of, held, product, save_small, texts_of

        dtype = dtype_of(settings)
        weights: dict[str, Any] = {}
        for name, base in trained.state.items():
            weight = trained.parameters[f"unet.{name}"]
            weights[name] = held(weight, dtype) if base is None else product(weight, base, self.rank, dtype)
        count = len(networks.texts)
        words = {
            word: tuple(held(trained.parameters[f"te{i}.{word}"][0], dtype) for i in range(1, count + 1))
            for word in self.words
        }
        record = Delta(weights, words, extras=texts_of(self, settings, saving))
        return [save_small(WRITERS[self.to](record), networks.family, saving)]


def _first_token_kept(layer: Linear) -> Callable[[Tensor], Tensor]:
    """Compute as a linear layer, but let no gradient through what the first token gives."""
    import torch
    from torch.nn.functional import linear

    def forward(x: Tensor) -> Tensor:
        y = linear(x, layer.weight, layer.bias)
        return torch.cat([y[:, :1].detach(), y[:, 1:]], 1)

    return forward


METHOD = CustomDiffusion
