"""LyCORIS around a module of diffusers, as SimpleTuner uses it: ``lycoris_transformer_blocks_0_attn_to_q.lokr_w1``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import write_with_alpha
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import EVERYTHING, read_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="lycoris-wrapper",
    title="LyCORIS around diffusers' modules",
    written_by="LyCORIS' create_lycoris, SimpleTuner",
    read_by="LyCORIS, SimpleTuner, ComfyUI (Flux, SD3)",
    holds=EVERYTHING - {"embeddings", "reshape"} | {"dora over columns"},
    alpha="tensor",
    naming=Naming(
        (
            Prefix("lycoris_", "unet", "transformer", families=("flux", "sd3")),
            Prefix("lycoris_", "unet", "unet"),
            Prefix("lycoris_", "te1", "clip"),
        ),
        KOHYA,
    ),
    marks=(r"^lycoris_",),
    read=read_named,
    write=write_with_alpha,
)
