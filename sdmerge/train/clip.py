"""The image side of a CLIP pair: features of pictures, and the projections into the space that pictures and texts share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from sdformats.errors import CorruptFile
from sdformats.files import open_source
from sdformats.json_file import read_object
from sdformats.views import Stored
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.train.loading import libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdformats.tensor import TensorSource
    from sdmerge.train.settings import ModelSettings

_MEAN, _SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of the colours that CLIP's pictures are scaled by, unless a preprocessor_config.json says otherwise."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PLACES = ("image_encoder", "clip")
_HEADS = 16
"""Of every published image encoder whose width is known here."""
_ACTIVATIONS = {1024: "quick_gelu", 1280: "gelu", 1664: "gelu"}
"""OpenAI's ViT-L/14, OpenCLIP's H/14 and bigG/14, by width: for weights without a configuration."""


@dataclass(frozen=True)
class ImageEncoder:
    """An image encoder.

    Attributes:
        model: pictures to features.
        text_projection: what the text encoder's vector is multiplied with to be compared with features, [width, inner];
            None where the file has none.
        mean, spread: [3] of the colours.
    """

    model: Any
    text_projection: Tensor | None
    mean: Tensor
    spread: Tensor

    @property
    def width(self) -> int:
        """How wide features are."""
        return int(self.model.config.projection_dim)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the features of pictures, [n, width], as long as the network makes them; differentiable.

        Args:
            pixels: [n, 3, height, width] in -1..1; scaled until they cover the encoder's square, and cut to it.
        """
        side = int(self.model.config.image_size)
        height, width = pixels.shape[-2:]
        if (height, width) != (side, side):
            scale = side / min(height, width)
            size = (max(side, round(height * scale)), max(side, round(width * scale)))
            pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
            top, left = (size[0] - side) // 2, (size[1] - side) // 2
            pixels = pixels[..., top : top + side, left : left + side]
        mean, spread = (one.reshape(1, 3, 1, 1).to(pixels) for one in (self.mean, self.spread))
        found: Tensor = self.model(pixel_values=((pixels + 1) / 2 - mean) / spread).image_embeds
        return found

    @torch.no_grad()
    def features_of(self, paths: Sequence[Path]) -> Tensor:
        """Return the features of picture files, [n, width].

        Raises:
            sdmerge.train.data.UnreadablePicture: one is broken.
        """
        from sdmerge.train import data

        found = []
        for path in paths:
            picture = data.opened(path)
            found.append(self.features(data.pixels(picture, picture.size)[0][None]))
        return torch.cat(found)


def load_image_encoder(wanted: str | None, settings: ModelSettings) -> ImageEncoder:
    """Load an image encoder, in float32, on the CPU, frozen.

    Args:
        wanted: a folder or a file of a CLIP model or of its image side; None: the model's own, in a diffusers folder.
        settings: the model's; ``model_config`` may describe the encoder, in ``image_encoder`` or ``clip``.

    Raises:
        RequestError: there is none.
        sdformats.errors.FormatError: it cannot be read, or lacks something.
    """
    place = Path(wanted) if wanted is not None else Path(settings.model) / "image_encoder"
    if wanted is None and not place.is_dir():
        raise RequestError(
            f"{settings.model}: has no image encoder of its own; give the CLIP model that its text encoder comes from, a "
            "folder or a file, with --clip"
        )
    weights = next((place / name for name in _WEIGHTS if (place / name).is_file()), place)
    with open_source(weights) as source:
        return _built(source, place, _folder_of(place, settings))


def _folder_of(place: Path, settings: ModelSettings) -> Path | None:
    """Return the folder with the encoder's config.json, if there is one."""
    folders = [place if place.is_dir() else place.parent]
    if settings.model_config is not None:
        folders = [Path(settings.model_config) / name for name in _PLACES] + folders
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _built(source: TensorSource, place: Path, folder: Path | None) -> ImageEncoder:
    import accelerate

    _, transformers = libraries()
    if not any(name.startswith("vision_model.") for name in source.specs):
        raise RequestError(f"{place}: {_NO_ENCODER}")
    if folder is None:
        config = _guessed(source, place)
    else:
        told = read_object(folder / "config.json")
        inner = told.get("vision_config")
        config = dict(inner if isinstance(inner, dict) else told)
        config["projection_dim"] = told.get("projection_dim", config.get("projection_dim", 768))
    with accelerate.init_empty_weights():
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    tensors = {}
    for key, empty in model.state_dict().items():
        if key not in source.specs or source.specs[key].shape != tuple(empty.shape):
            there = list(source.specs[key].shape) if key in source.specs else "not there"
            raise CorruptFile(f"is {there}", path=place, key=key, expected=f"the shape {list(empty.shape)}")
        tensors[key] = value(Stored(source, key)).float()
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False).eval()
    projection = value(Stored(source, _PROJECTION)).float() if _PROJECTION in source.specs else None
    scaling = read_object(folder / _SCALING) if folder is not None and (folder / _SCALING).is_file() else {}
    mean, spread = (
        torch.tensor(scaling.get(name, usual)) for name, usual in (("image_mean", _MEAN), ("image_std", _SPREAD))
    )
    return ImageEncoder(model, projection, mean, spread)


_NO_ENCODER = (
    "is no image encoder that is known here (expected transformers' CLIPVisionModelWithProjection or CLIPModel; for unusual "
    "widths with its config.json beside it, or in clip/ of --model-config)"
)
_PROJECTION, _SCALING = "text_projection.weight", "preprocessor_config.json"


def _guessed(source: TensorSource, place: Path) -> dict[str, Any]:
    """Return the configuration of a published encoder, by its shapes.

    Raises:
        RequestError: it is none of those.
    """
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    patches, projection = (
        shapes.get(name) for name in ("vision_model.embeddings.patch_embedding.weight", "visual_projection.weight")
    )
    if patches is None or projection is None or patches[0] not in _ACTIVATIONS:
        raise RequestError(f"{place}: {_NO_ENCODER}")
    inner = "vision_model.encoder.layers.{}.mlp.fc1.weight"
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    layers = 0
    while inner.format(layers) in shapes:
        layers += 1
    return {
        "hidden_size": patches[0],
        "intermediate_size": shapes[inner.format(0)][0],
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "patch_size": patches[2],
        "image_size": round((positions - 1) ** 0.5) * patches[2],
        "projection_dim": projection[0],
        "hidden_act": _ACTIVATIONS[patches[0]],
    }
