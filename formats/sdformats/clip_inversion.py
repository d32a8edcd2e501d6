"""CLIP inversion: image embeddings that were trained, for models that take one as their context."""

from sdformats.kind import Kind, Marked

KIND = Kind(
    name="clip-inversion",
    title="a CLIP inversion (trained image embeddings)",
    layouts=(Marked(name="sdmerge", marks=(r"^clip_image$",)),),
)
