"""diffusers 0.17 to 0.20: attention processors behind ``unet.``, text encoders' layers behind ``text_encoder.``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._processors import ProcessorNaming
from sdformats.adapters.layouts._shared import UNET_FAMILIES
from sdformats.adapters.naming import Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import DIFFUSERS

LAYOUT = AdapterLayout(
    name="diffusers-old",
    title="diffusers' attention processors with prefixes",
    written_by="diffusers 0.17 to 0.20",
    read_by="diffusers, ComfyUI",
    holds=frozenset({"lora"}),
    alpha="none",
    naming=ProcessorNaming(
        (
            Prefix("unet.", "unet", "unet", flat=False),
            Prefix("text_encoder.", "te1", "clip", flat=False),
            Prefix("text_encoder_2.", "te2", "clip", flat=False),
        ),
        {
            "lora_linear_layer.down.weight": DIFFUSERS["lora_linear_layer.down.weight"],
            "lora_linear_layer.up.weight": DIFFUSERS["lora_linear_layer.up.weight"],
        },
        "unet.",
    ),
    needs=(r"\.processor\.to_(q|k|v|out)_lora\.|\.self_attn\.to_(q|k|v|out)_lora\.|^unet\.",),
    bars=(r"^(down_blocks|mid_block|up_blocks)\.", r"\.lora_[AB]\.", r"^unet\..*\.lora\."),
    marks=(r"^unet\..*\.processor\.to_(q|k|v|out)_lora\.", r"^text_encoder(_2)?\."),
    families=UNET_FAMILIES,
    read=read_named,
    write=write_named,
)
