"""sd-scripts for SD3, with its makers' module names: ``lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import KOHYA_TEXT_ENCODERS, LORA, LYCORIS_ENDS
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="sd3-kohya",
    title="sd-scripts for SD3, with its makers' module names",
    written_by="sd-scripts (networks.lora_sd3)",
    read_by="sd-scripts, ComfyUI",
    holds=LORA | {"embeddings"},
    alpha="tensor",
    naming=Naming((Prefix("lora_unet_", "unet", "sd3"), *KOHYA_TEXT_ENCODERS), KOHYA),
    needs=(r"^lora_unet_(joint_blocks|x_embedder|context_embedder|t_embedder|y_embedder|final_layer)",),
    bars=(LYCORIS_ENDS, r"^lora_unet_(double_blocks|single_blocks|down_blocks|input_blocks)"),
    marks=(
        r"^lora_unet_(joint_blocks|x_embedder|context_embedder|t_embedder|y_embedder|final_layer)",
        r"^lora_te[123]_",
    ),
    families=("sd3",),
    read=read_named,
    write=write_named,
)
