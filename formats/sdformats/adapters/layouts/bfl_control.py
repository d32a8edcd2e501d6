"""Flux's control LoRAs from its makers: bare names, ``img_in.lora_A.weight``, biases, and the norms' new scales."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named
from sdformats.adapters.roles import PEFT

LAYOUT = AdapterLayout(
    name="bfl-control",
    title="control LoRAs from Flux's makers",
    written_by="Black Forest Labs (FLUX.1 Canny, Depth)",
    read_by="diffusers, ComfyUI",
    holds=frozenset({"lora", "bias", "full", "replaced weights"}),
    alpha="none",
    naming=Naming((Prefix("", "unet", "flux", flat=False),), PEFT | {"scale": "set_weight"}),
    bars=(r"\.processor\.",),
    marks=(
        r"^(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|double_blocks|single_blocks)\..*(lora_[AB]\.|\.scale$)",
    ),
    families=("flux",),
    read=read_named,
)
