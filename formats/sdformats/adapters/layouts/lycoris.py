"""LyCORIS in sd-scripts' naming: every algorithm, with the module names that sd-scripts has for the family."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._shared import KOHYA_TEXT_ENCODERS, LYCORIS_ENDS, write_with_alpha
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import EVERYTHING, read_named
from sdformats.adapters.roles import KOHYA

LAYOUT = AdapterLayout(
    name="lycoris",
    title="LyCORIS in sd-scripts' naming",
    written_by="LyCORIS (LoCon, LoHa, LoKr, IA3, GLoRA, OFT, BOFT, full, norms, DoRA), OneTrainer",
    read_by="A1111, Forge, ComfyUI, InvokeAI, LyCORIS",
    holds=EVERYTHING | {"dora over columns"},
    alpha="tensor",
    naming=Naming(
        (
            Prefix("lora_unet_", "unet", "sgm", families=("sdxl", "sdxl-refiner")),
            Prefix("lora_unet_", "unet", "flux", families=("flux",)),
            Prefix("lora_unet_", "unet", "sd3", families=("sd3",)),
            Prefix("lora_unet_", "unet", "unet"),
            *KOHYA_TEXT_ENCODERS,
        ),
        KOHYA,
    ),
    needs=(r"^lora_(unet|te\d?)_.*" + LYCORIS_ENDS,),
    bars=(r"^lora_transformer_",),
    marks=(r"^lora_(unet|te\d?)_",),
    read=read_named,
    write=write_with_alpha,
)
