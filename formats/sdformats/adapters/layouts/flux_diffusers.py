"""diffusers and ai-toolkit for Flux: ``transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight``, at scale 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._diffusers import KEY, read
from sdformats.adapters.layouts._shared import DIFFUSERS_TEXT_ENCODERS, LORA
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import write_named
from sdformats.adapters.roles import DIFFUSERS, PEFT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.tensor import Spec

_WIDTH = 3072


def is_flux(specs: Mapping[str, Spec]) -> bool:
    """Tell Flux from SD3, whose blocks have the same names: by single blocks, or by its width."""
    if any(".single_transformer_blocks." in name for name in specs):
        return True
    return any(_WIDTH in spec.shape for name, spec in specs.items() if name.startswith("transformer."))


LAYOUT = AdapterLayout(
    name="flux-diffusers",
    title="diffusers' LoRA files for Flux",
    written_by="diffusers, ai-toolkit, SimpleTuner",
    read_by="diffusers, ComfyUI, Forge, InvokeAI",
    holds=LORA,
    alpha="none",
    naming=Naming((Prefix("transformer.", "unet", "any", flat=False), *DIFFUSERS_TEXT_ENCODERS), PEFT | DIFFUSERS),
    needs=(
        r"^transformer\.(single_transformer_blocks|transformer_blocks|x_embedder|context_embedder|time_text|norm_out|proj_)",
    ),
    bars=(r"\.attn2\.", r"^transformer\.pos_embed", r"^unet\."),
    marks=(r"^transformer\.", r"^text_encoder(_2)?\."),
    families=("flux",),
    read=read,
    write=write_named,
    keep=(KEY,),
    fits=is_flux,
)
