"""sd-scripts for SD1 and SD2, with diffusers' module names: ``lora_unet_down_blocks_0_..._to_q.lora_down.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import KOHYA_TEXT_ENCODERS, LORA, LYCORIS_ENDS, UNET_FAMILIES
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="kohya",
    title="sd-scripts with diffusers' module names",
    written_by="sd-scripts (SD1, SD2), LCM-LoRA, OneTrainer",
    read_by="sd-scripts, A1111, Forge, ComfyUI, InvokeAI, diffusers",
    holds=LORA | {"embeddings"},
    alpha="tensor",
    naming=Naming((Prefix("lora_unet_", "unet", "unet"), *KOHYA_TEXT_ENCODERS), KOHYA),
    bars=(
        LYCORIS_ENDS,
        r"^lora_unet_(input_blocks|middle_block_|output_blocks|double_blocks|single_blocks|joint_blocks)",
        r"^lora_te3_",
    ),
    marks=(r"^lora_unet_(down_blocks|mid_block|up_blocks|conv_|time_embedding|add_embedding)", r"^lora_te_"),
    families=UNET_FAMILIES,
    read=read_named,
    write=write_named,
)
