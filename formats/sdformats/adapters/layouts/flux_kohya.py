"""sd-scripts for Flux, with its makers' module names: ``lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import KOHYA_TEXT_ENCODERS, LORA, LYCORIS_ENDS
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="flux-kohya",
    title="sd-scripts for Flux, with its makers' module names",
    written_by="sd-scripts (networks.lora_flux)",
    read_by="sd-scripts, Forge, ComfyUI, InvokeAI, diffusers",
    holds=LORA | {"embeddings"},
    alpha="tensor",
    naming=Naming((Prefix("lora_unet_", "unet", "flux"), *KOHYA_TEXT_ENCODERS), KOHYA),
    bars=(LYCORIS_ENDS, r"^lora_unet_(joint_blocks|down_blocks|input_blocks)", r"^lora_te2_text_model"),
    marks=(
        r"^lora_unet_(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)",
        r"^lora_te[13]_",
        r"^lora_te2_encoder_block",
    ),
    families=("flux",),
    fits=lambda specs: not all(name.startswith("lora_te1_") for name in specs),  # that is kohya-sgm's as well
    read=read_named,
    write=write_named,
)
