"""sd-scripts for SDXL, with the module names of the single files: ``lora_unet_input_blocks_4_1_..._to_q.lora_down.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import KOHYA_TEXT_ENCODERS, LORA, LYCORIS_ENDS, UNET_FAMILIES
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="kohya-sgm",
    title="sd-scripts with the single files' module names",
    written_by="sd-scripts (SDXL), OneTrainer",
    read_by="sd-scripts, A1111, Forge, ComfyUI, InvokeAI, diffusers (SDXL alone)",
    holds=LORA | {"embeddings"},
    alpha="tensor",
    naming=Naming((Prefix("lora_unet_", "unet", "sgm"), *KOHYA_TEXT_ENCODERS), KOHYA),
    bars=(
        LYCORIS_ENDS,
        r"^lora_unet_(down_blocks|mid_block_|up_blocks|double_blocks|single_blocks|joint_blocks)",
        r"^lora_te3_",
        r"^lora_te2_encoder_block_",
        r"^lora_(transformer|prior_unet)_",
    ),
    marks=(r"^lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_)", r"^lora_te[12]_"),
    families=UNET_FAMILIES,
    read=read_named,
    write=write_named,
)
