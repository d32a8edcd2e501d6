"""HCP-Diffusion: ``M.___.layer.W_down``, a file for the UNet and one for the text encoders.

The number beside the factors, ``alpha`` or ``scale``, is what the change is multiplied with, already divided by the rank.
"""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import LORA
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named
from sdformats.adapters.roles import DOWN, UP

_STARTS = ("", "lora.", "lora:")

LAYOUT = AdapterLayout(
    name="hcp",
    title="HCP-Diffusion's blocks beside their hosts",
    written_by="HCP-Diffusion",
    read_by="HCP-Diffusion",
    holds=LORA,
    alpha="tensor",
    naming=Naming(
        tuple(
            Prefix(start + inner, component, table, flat=False)
            for start in _STARTS
            for inner, component, table in (
                ("", "unet", "unet"),
                ("clip_B.", "te1", "clip"),
                ("clip_bigG.", "te2", "clip"),
                ("", "te1", "clip"),
            )
        ),
        {
            "___.layer.W_down": DOWN,
            "___.layer.W_up": UP,
            "___.layer.lora_down.weight": DOWN,
            "___.layer.lora_up.weight": UP,
            "___.alpha": "scale",
            "___.scale": "scale",
        },
    ),
    marks=(r"\.___\.",),
    read=read_named,
)
