"""What changes pictures beside a model's weights: new words, styles, inverted pictures, and image embeddings."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdformats import clip_inversion, null_text
from sdformats.clip_inversion import read_clip_inversion
from sdformats.errors import FormatError
from sdformats.files import open_source
from sdformats.layout import detect
from sdformats.null_text import read_null_text
from sdmerge.errors import RequestError
from sdmerge.lora.refs import finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdformats.kind import Kind
    from sdformats.tensor import TensorSource
    from sdmerge.sampling import Painting
    from sdmerge.train.networks import Condition, Networks
    from sdmerge.train.settings import ModelSettings
    from sdmerge.train.style import Style


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is to be applied.

    Attributes:
        embeddings: of new words; prompts call them by the token in the file, or by the file's name.
        aesthetic: an aesthetic embedding, and how many steps the text encoder takes toward it.
        rate, weight, slerp: see `sdmerge.train.style.Style`.
        clip: the CLIP model that the text encoder comes from, for `aesthetic`.
        null_text: a null-text inversion: the picture begins with its noise, and takes as many steps.
        image: an image embedding in the prompt's place, for models that are conditioned on images.
    """

    embeddings: tuple[Path, ...] = ()
    aesthetic: tuple[Path, int] | None = None
    rate: float = 1e-4
    weight: float = 1.0
    slerp: bool = False
    clip: str | None = None
    null_text: Path | None = None
    image: Path | None = None

    @property
    def prompt(self) -> str | None:
        """The prompt that stands in a file, for a request without one."""
        if self.null_text is None:
            return "" if self.image is not None else None
        with _opened(self.null_text, null_text.KIND) as source:
            return read_null_text(source).texts.get("prompt")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Files that were read, for networks that they fit.

    Attributes:
        style: see `sdmerge.train.style`.
        nulls: what the unconditional branch is told, for every step, the noisiest first; none: the negative prompt.
        noise: [1, 4, height, width] to begin with; None: by the seed.
        image: [tokens, width], what the network is told in place of prompts.
        guidance: that a null-text inversion was made for.
        notes: what a user should know.
    """

    style: Style | None = None
    nulls: tuple[Condition, ...] = ()
    noise: Tensor | None = None
    image: Tensor | None = None
    guidance: float | None = None
    notes: tuple[str, ...] = field(default=())

    def told(self, networks: Networks, prompt: str) -> Condition:
        """Return what the network is told."""
        from sdmerge.train import style
        from sdmerge.train.clip_inversion import seen

        if self.image is not None:
            return seen(self.image, 1)
        return networks.read([prompt]) if self.style is None else style.read(networks, prompt, self.style)

    def against(self, networks: Networks, negative: str) -> Condition | Sequence[Condition]:
        """Return what the unconditional branch is told, in all steps or in each."""
        from sdmerge.train.clip_inversion import seen

        if self.image is not None:
            return seen(self.image * 0, 1)
        return self.nulls or networks.read([negative])

    def changed(self, painting: Painting) -> Painting:
        """Return how to paint: a null-text inversion says how many steps, and with which guidance."""
        if not self.nulls:
            return painting
        guidance = painting.guidance if self.guidance is None else self.guidance
        return replace(painting, steps=len(self.nulls), guidance=guidance, scheduler="ddim")


def apply(files: Files, networks: Networks, settings: ModelSettings) -> Applied:
    """Read files, and give the networks' text encoders the new words.

    Raises:
        RequestError: a file is not for this model.
        sdmerge.errors.NonFiniteInput: it holds NaN or infinity.
        sdformats.errors.FormatError: a file cannot be read, or is something else.
    """
    from sdmerge.train.clip import load_image_encoder
    from sdmerge.train.style import Style, encoder_for, read_style

    for path in files.embeddings:
        _add_words(path, networks)
    found = Applied()
    if files.aesthetic is not None:
        path, steps = files.aesthetic
        projection = None
        if networks.family == "sd1":
            projection = load_image_encoder(files.clip, settings).text_projection
        style = Style(
            embedding=read_style(path),
            projection=projection,
            steps=steps,
            rate=files.rate,
            weight=files.weight,
            slerp=files.slerp,
        )
        try:
            encoder_for(networks, style)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error
        found = replace(found, style=style)
    if files.null_text is not None:
        found = _with_inversion(found, files.null_text, networks)
    if files.image is not None:
        found = replace(found, image=_image(files.image, networks))
    return found


@contextmanager
def _opened(path: Path, kind: Kind) -> Iterator[TensorSource]:
    """Open a small file that must be of some kind."""
    with open_source(path) as source:
        seen = detect(source.specs, metadata=source.metadata)
        if kind.name not in {reading.kind for reading in seen.readings}:
            what = seen.readings[0].title if seen.readings else seen.kind
            raise FormatError(f"is {what}", path=path, expected=kind.title)
        yield source


def _add_words(path: Path, networks: Networks) -> None:
    from contextlib import ExitStack

    from sdmerge.embedding.convert import open_one
    from sdmerge.options import Options
    from sdmerge.train.words import ENCODERS

    with ExitStack() as stack:
        _, embedding, _ = open_one(stack, path, Options())
        for word in embedding.words:
            vectors = []
            for i, encoder in enumerate(ENCODERS[networks.family], 1):
                width = networks.texts[i - 1].width
                ref = word.vectors.get(encoder)
                if ref is None or ref.shape[1] != width:
                    has = ", ".join(f"{name} {one.shape[1]}" for name, one in word.vectors.items()) or "no vectors"
                    raise RequestError(f"{path}: is not for this model (it has {has}; expected {encoder} {width})")
                vectors.append(finite(ref, path))
            for text, found in zip(networks.texts, vectors, strict=True):
                text.add_word(word.token or path.stem, found)


def _with_inversion(found: Applied, path: Path, networks: Networks) -> Applied:
    import torch

    from sdmerge.train.networks import Condition

    if networks.family == "sdxl":
        raise RequestError(f"{path}: null-text inversions of SDXL have no vector for the whole text; use SD1 or SD2")
    with _opened(path, null_text.KIND) as source:
        record = read_null_text(source)
        contexts = finite(record.embeddings, path)
        noise = None if record.noise is None else finite(record.noise, path)
    width = int(networks.unet.config.cross_attention_dim)
    if contexts.shape[-1] != width:
        raise RequestError(
            f"{path}: is for texts {contexts.shape[-1]} wide, and the model's are {width} (expected an inversion by this model)"
        )
    notes = (
        () if noise is not None else (f"{path}: holds no noise; begins with the seed's, so it paints another picture",)
    )
    guidance = record.texts.get("guidance")
    return replace(
        found,
        nulls=tuple(Condition(one) for one in torch.unbind(contexts)),
        noise=noise,
        guidance=None if guidance is None else float(guidance),
        notes=notes,
    )


def _image(path: Path, networks: Networks) -> Tensor:
    with _opened(path, clip_inversion.KIND) as source:
        vectors = finite(read_clip_inversion(source).vectors, path)
    width = int(networks.unet.config.cross_attention_dim)
    if vectors.shape[-1] != width:
        raise RequestError(
            f"{path}: is {vectors.shape[-1]} wide, and the model is told {width} (expected an embedding that was trained for it)"
        )
    found: Tensor = vectors
    return found
