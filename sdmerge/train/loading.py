"""Load a model's networks from a file or folder of any spelling, without ever running what a file says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.errors import CorruptFile
from sdformats.files import open_source
from sdformats.json_file import read_object
from sdformats.layout import detect
from sdformats.renamed import component
from sdformats.views import Stored
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.train.networks import Networks
from sdmerge.train.text import TextEncoder

if TYPE_CHECKING:
    from sdformats.tensor import TensorSource
    from sdmerge.train.settings import ModelSettings

_TEXT_ENCODERS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
"""The families that can be trained and painted with, and their text encoders."""


def libraries() -> tuple[Any, Any]:
    """Return diffusers and transformers, told to speak of errors only.

    Raises:
        RequestError: they are not installed.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise RequestError(
            f"training and painting need a package that is not here ({error}); pip install 'sdmerge[train]'"
        ) from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


def load(settings: ModelSettings) -> Networks:
    """Load the networks of a model; see `build`."""
    path = Path(settings.model)
    with open_source(path) as source:
        return build(source, settings)


def build(source: TensorSource, settings: ModelSettings) -> Networks:
    """Build the networks of an open model, in float32, on the CPU, frozen.

    Raises:
        sdformats.errors.FormatError: a file cannot be read, or holds something else than its configuration says.
        RequestError: the model is of a family that is not trained here, or has no configuration or tokenizer.
    """
    diffusers, _ = libraries()
    path = Path(settings.model)
    seen = detect(source.specs, family=settings.family)
    if seen.family not in _TEXT_ENCODERS:
        raise RequestError(f"{path}: is {seen.family or 'of no known family'} (expected sd1, sd2 or sdxl)")
    configs = _configs(path, settings)
    unet = _module(source, "unet", configs, diffusers.UNet2DConditionModel.from_config, settings.family)
    if unet.config.in_channels != 4:
        raise RequestError(f"{path}: its network takes {unet.config.in_channels} channels (expected 4: no inpainting)")
    vae = _module(source, "vae", configs, diffusers.AutoencoderKL.from_config, settings.family)
    texts = text_encoders(source, settings)
    scheduler = read_object(configs / "scheduler" / "scheduler_config.json")
    networks = Networks(seen.family, unet, vae, texts, scheduler, settings.clip_skip)
    networks.freeze()
    return networks


def text_encoders(source: TensorSource, settings: ModelSettings) -> tuple[TextEncoder, ...]:
    """Build the text encoders of an open model alone, in float32, on the CPU; errors as `build`."""
    _, transformers = libraries()
    path = Path(settings.model)
    seen = detect(source.specs, family=settings.family)
    if seen.family not in _TEXT_ENCODERS:
        raise RequestError(f"{path}: is {seen.family or 'of no known family'} (expected sd1, sd2 or sdxl)")
    configs = _configs(path, settings)
    texts = []
    for name in _TEXT_ENCODERS[seen.family]:
        projected = name == "text_encoder_2"
        make = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        encoder = _module(
            source, name, configs, lambda c, make=make: make(transformers.CLIPTextConfig(**c)), settings.family
        )
        folder = _tokenizer(name.replace("text_encoder", "tokenizer"), configs, settings)
        texts.append(TextEncoder(encoder, transformers.CLIPTokenizer.from_pretrained(str(folder))))
    return tuple(texts)


def _configs(path: Path, settings: ModelSettings) -> Path:
    """Return the folder that describes the networks."""
    if settings.model_config is not None:
        return Path(settings.model_config)
    if (path / "model_index.json").is_file():
        return path
    raise RequestError(
        f"{path}: nothing describes its networks; give a diffusers folder of such a model with --model-config"
    )


def _tokenizer(name: str, configs: Path, settings: ModelSettings) -> Path:
    folder = Path(settings.tokenizer) if settings.tokenizer is not None else configs / name
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise RequestError(
            f"{folder}: holds no vocabulary (expected CLIP's vocab.json and merges.txt; any diffusers folder of Stable "
            "Diffusion has them in tokenizer/: give that with --tokenizer)"
        )
    return folder


def _module(source: TensorSource, name: str, configs: Path, make: Any, family: str | None) -> Any:
    """Build a network without starting values, and give it those of the file."""
    import accelerate

    with accelerate.init_empty_weights():
        module = make(read_object(configs / name / "config.json"))
    held = component(source, name, family=family)
    wanted = module.state_dict()
    tensors = {}
    for key, empty in wanted.items():
        known = next(
            (one for one in (key, f"text_model.{key}", key.removeprefix("text_model.")) if one in held.specs), None
        )
        if known is None or held.specs[known].shape != tuple(empty.shape):
            there = "is not there" if known is None else f"has the shape {list(held.specs[known].shape)}"
            raise CorruptFile(
                f"{there}, which the configuration asks for", path=source.path, key=f"{name}.{key}",
                expected=str(list(empty.shape)), advice="give the model's own configuration with --model-config",
            )  # fmt: skip
        tensors[key] = value(Stored(held, known)).to(empty.dtype)
    module.load_state_dict(tensors, assign=True)
    return module
