"""sd-scripts' names: ``emb_params`` for one text encoder, the encoders' names for several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import Written
from sdformats.embeddings.embedding import Embedding, Word, encoder_of
from sdformats.embeddings.layout import MIXED, ONE, EmbeddingLayout
from sdformats.embeddings.layouts import ai_toolkit
from sdformats.embeddings.layouts._shared import header, one, vectors, vectors_only
from sdformats.errors import CorruptFile
from sdformats.torch_pickle import TensorNamed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.kind import Looks
    from sdformats.tensor import TensorSource
    from sdformats.torch_pickle import Tree
    from sdformats.views import Ref

LONE = "emb_params"


def _fits(looks: Looks) -> bool:
    return vectors_only(looks) and not ai_toolkit.fits(looks)


def _trainer(metadata: Mapping[str, str]) -> str | None:
    if "modelspec.encoder_layer" in metadata or any(key.startswith("ss_") for key in metadata):
        return "sd-scripts"
    return None


def encoders(source: TensorSource, lone: str = LONE) -> dict[str, Ref]:
    """Return the tensors by encoder.

    Raises:
        CorruptFile: there are names of both kinds.
    """
    if lone not in source.specs:
        return {key.removesuffix("xxl"): vectors(source, key) for key in source.specs}
    if len(source.specs) > 1:
        raise CorruptFile(f"has names of one text encoder and of several ({', '.join(source.specs)})", path=source.path)
    return one(source, lone)


def read(source: TensorSource) -> Embedding:
    """Read the one word."""
    word = Word(None, encoders(source))
    return Embedding((word,), trainer=_trainer(source.metadata), **header(source.metadata))


def tensors(word: Word, lone: str = LONE) -> dict[str, Ref]:
    """Return a word's tensors by their names: the lone one where the width tells the encoder."""
    (name, ref), *others = word.vectors.items()
    if not others and name in ("clip_l", "open_clip") and encoder_of(ref.shape[1]) == name:
        return {lone: ref}
    return dict(word.vectors)


def write(embedding: Embedding) -> Written:
    """Write the one word."""
    (word,) = embedding.words
    found, said = tensors(word), embedding.texts
    # In a pickle A1111 suffers nothing beside a lone tensor; beside several there may be texts.
    tree: dict[str, Tree] = {name: TensorNamed(name) for name in found}
    if len(found) > 1:
        tree.update(said)
    return Written(found, said, tree=tree)


LAYOUT = EmbeddingLayout(
    name="kohya",
    title="sd-scripts' emb_params; for SDXL clip_l and clip_g, which most programs read",
    written_by="sd-scripts, diffusers' advanced scripts, OneTrainer (SDXL)",
    read_by="sd-scripts, A1111, SD.Next, Forge, ComfyUI, InvokeAI",
    marks=(r"^(emb_params|clip_[lg]|t5(xxl)?)$",),
    fits=_fits,
    containers=("safetensors", "torch", "png"),
    encoders=ONE | MIXED,
    read=read,
    write=write,
)
