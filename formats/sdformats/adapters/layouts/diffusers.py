"""diffusers today: ``unet.down_blocks....to_q.lora_A.weight``, scales in the metadata ``lora_adapter_metadata``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._diffusers import KEY, read, write
from sdformats.adapters.layouts._shared import DIFFUSERS_TEXT_ENCODERS, LORA, UNET_FAMILIES
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.roles import DIFFUSERS, MAGNITUDE, PEFT

# Without .weight, transformers 5 does not find the lengths of text encoders; with it, all do.
_ENDS = {"lora_magnitude_vector.weight": MAGNITUDE} | PEFT | DIFFUSERS

LAYOUT = AdapterLayout(
    name="diffusers",
    title="diffusers' LoRA files",
    written_by="diffusers 0.21 and later, its training scripts",
    read_by="diffusers, ComfyUI (in part), InvokeAI",
    holds=LORA | {"dora"},
    alpha="metadata",
    naming=Naming((Prefix("unet.", "unet", "any", flat=False), *DIFFUSERS_TEXT_ENCODERS), _ENDS),
    bars=(r"\.processor\.", r"\.to_(q|k|v|out)_lora\.", r"^transformer\.", r"^unet\.base_model\."),
    marks=(r"^(unet|text_encoder(_[23])?)\..*\.(lora|lora_linear_layer|lora_[AB])(\.|$)",),
    families=UNET_FAMILIES,
    read=read,
    write=write,
    keep=(KEY,),
)
