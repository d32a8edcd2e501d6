"""OneTrainer for Flux and SD3, with diffusers' names: ``lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import EVERYTHING, read_named, write_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="onetrainer",
    title="OneTrainer for Flux and SD3, with diffusers' module names",
    written_by="OneTrainer (legacy LoRA format)",
    read_by="OneTrainer, ComfyUI, InvokeAI",
    holds=EVERYTHING - {"reshape"} | {"dora over columns"},
    alpha="tensor",
    naming=Naming(
        (
            Prefix("lora_transformer_", "unet", "transformer"),
            Prefix("lora_te1_", "te1", "clip"),
            Prefix("lora_te2_", "te3", "t5", families=("flux",)),
            Prefix("lora_te2_", "te2", "clip"),
            Prefix("lora_te3_", "te3", "t5"),
        ),
        KOHYA,
    ),
    needs=(r"^lora_transformer_",),
    marks=(r"^lora_transformer_", r"^lora_te[123]_"),
    families=("flux", "sd3"),
    read=read_named,
    write=write_named,
)
