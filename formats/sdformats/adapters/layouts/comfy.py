"""ComfyUI's own: the model's names, whatever the model, ``diffusion_model.input_blocks.1.1....to_q.lora_up.weight``."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import EVERYTHING, read_named, write_named
from sdformats.adapters.roles import KOHYA, PEFT

LAYOUT = AdapterLayout(
    name="comfy",
    title="ComfyUI's generic names",
    written_by="ComfyUI (LoraSave), OneTrainer (Comfy format), ai-toolkit",
    read_by="ComfyUI, Forge (Flux)",
    holds=EVERYTHING - {"embeddings"} | {"dora over columns", "replaced weights"},
    alpha="tensor",
    naming=Naming(
        (
            Prefix("diffusion_model.", "unet", "flux", flat=False, families=("flux",)),
            Prefix("diffusion_model.", "unet", "sd3", flat=False, families=("sd3",)),
            Prefix("diffusion_model.", "unet", "sgm", flat=False),
            Prefix("diffusion_model.", "unet", "transformer", flat=False, reads_only=True),
            Prefix("text_encoders.clip_h.transformer.", "te1", "clip", flat=False, families=("sd2",)),
            Prefix("text_encoders.clip_l.transformer.", "te1", "clip", flat=False),
            Prefix("text_encoders.clip_g.transformer.", "te2", "clip", flat=False),
            Prefix("text_encoders.t5xxl.transformer.", "te3", "t5", flat=False),
        ),
        KOHYA | PEFT,
    ),
    marks=(r"^diffusion_model\.", r"^text_encoders\.(clip_[lgh]|t5xxl)\."),
    read=read_named,
    write=write_named,
)
