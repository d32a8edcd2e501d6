"""Hypernetworks: small networks that change the context of every attention layer of one width."""

from sdformats.kind import Kind, Marked

KIND = Kind(
    name="hypernetwork",
    title="a hypernetwork",
    layouts=(
        Marked(name="a1111", marks=(r"^\d+\.[01]\.linear\.",)),
        Marked(name="novelai", marks=(r"^\d+\.[01]\.linear[12]\.",)),
    ),
)
