"""Load a model's networks from a file or folder of any spelling, without ever running what a file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.configs import INDEX, folder_configs
from sdformats.configs.known import of_folder, of_metadata
from sdformats.errors import CorruptFile
from sdformats.files import open_source
from sdformats.layout import DIFFUSERS, detect
from sdformats.renamed import component, spelled
from sdformats.views import Stored
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.prediction import schedule_of
from sdmerge.train.networks import Networks
from sdmerge.train.text import TextEncoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.configs import Config
    from sdformats.layout import Detection
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
        RequestError: the model is of a family that is not trained here, nothing describes its networks, or it has no tokenizer.
    """
    diffusers, _ = libraries()
    seen = _seen(source, settings)
    configs = _configs(source, seen, settings)
    unet = _module(source, "unet", configs, diffusers.UNet2DConditionModel.from_config, settings.family)
    if unet.config.in_channels != 4:
        raise RequestError(
            f"{settings.model}: its network takes {unet.config.in_channels} channels (expected 4: no inpainting)"
        )
    vae = _module(source, "vae", configs, diffusers.AutoencoderKL.from_config, settings.family)
    texts = text_encoders(source, settings)
    networks = Networks(str(seen.family), unet, vae, texts, configs.get("scheduler", {}), settings.clip_skip)
    networks.freeze()
    return networks


def text_encoders(source: TensorSource, settings: ModelSettings) -> tuple[TextEncoder, ...]:
    """Build the text encoders of an open model alone, in float32, on the CPU; errors as `build`."""
    _, transformers = libraries()
    seen = _seen(source, settings)
    configs = _configs(source, seen, settings)
    texts = []
    for name in _TEXT_ENCODERS[str(seen.family)]:
        projected = name == "text_encoder_2"
        make = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        encoder = _module(
            source, name, configs, lambda c, make=make: make(transformers.CLIPTextConfig(**c)), settings.family
        )
        folder = _tokenizer(name.replace("text_encoder", "tokenizer"), settings)
        texts.append(TextEncoder(encoder, transformers.CLIPTokenizer.from_pretrained(str(folder))))
    return tuple(texts)


def _seen(source: TensorSource, settings: ModelSettings) -> Detection:
    """Say what a model is.

    Raises:
        RequestError: it is none that can be trained.
    """
    seen = detect(source.specs, family=settings.family)
    if seen.family not in _TEXT_ENCODERS:
        raise RequestError(f"{settings.model}: is {seen.family or 'of no known family'} (expected sd1, sd2 or sdxl)")
    return seen


def _folder(settings: ModelSettings) -> Path | None:
    """Return the folder that describes the networks and has their tokenizers; None where the model is a file alone."""
    folder = Path(settings.model_config or settings.model)
    return folder if settings.model_config is not None or (folder / INDEX).is_file() else None


def _configs(source: TensorSource, seen: Detection, settings: ModelSettings) -> Mapping[str, Config]:
    """Return the configurations of the networks and of the scheduler, by component.

    A file alone is described by what it carries, and by its family where its sizes are the family's.

    Raises:
        RequestError: its sizes are others, which leaves open how they are divided.
    """
    folder = _folder(settings)
    if folder is not None:
        return of_folder(folder, ("unet", "vae", *_TEXT_ENCODERS[str(seen.family)]))
    came = of_metadata(source.metadata)
    asked = None if settings.prediction == "auto" else settings.prediction
    schedule = schedule_of(seen, source, came.get("scheduler", {}), asked)
    specs = spelled(source, DIFFUSERS, family=settings.family).specs
    made = folder_configs(str(seen.family), seen.variant, specs, schedule, came)
    if made.assumed:
        raise RequestError(
            f"{settings.model}: is of unusual sizes, and nothing tells {made.assumed[0]}; give a diffusers folder of such a "
            "model with --model-config"
        )
    return {name.partition("/")[0]: json.loads(text) for name, text in made.texts.items() if "/" in name}


def _tokenizer(name: str, settings: ModelSettings) -> Path:
    folder = _folder(settings)
    found = Path(settings.tokenizer) if settings.tokenizer is not None else None if folder is None else folder / name
    if found is None or not any((found / one).is_file() for one in ("tokenizer.json", "vocab.json")):
        raise RequestError(
            f"{found or settings.model}: holds no vocabulary (expected CLIP's vocab.json and merges.txt; any diffusers folder of "
            "Stable Diffusion has them in tokenizer/: give that with --tokenizer)"
        )
    return found


def _module(source: TensorSource, name: str, configs: Mapping[str, Config], make: Any, family: str | None) -> Any:
    """Build a network without starting values, and give it those of the file."""
    import accelerate

    if name not in configs:
        raise CorruptFile("has no configuration", path=source.path, key=name, advice="give one with --model-config")
    with accelerate.init_empty_weights():
        module = make(dict(configs[name]))
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
