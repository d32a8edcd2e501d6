"""diffusers up to 0.16: the UNet's attention processors alone, without a prefix."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.layouts._processors import ProcessorNaming
from sdformats.adapters.layouts._shared import UNET_FAMILIES
from sdformats.adapters.naming import Prefix
from sdformats.adapters.reading import read_named
from sdformats.adapters.roles import DIFFUSERS

LAYOUT = AdapterLayout(
    name="attn-procs",
    title="diffusers' first attention processors",
    written_by="diffusers up to 0.16 (save_attn_procs)",
    read_by="diffusers (load_attn_procs)",
    holds=frozenset({"lora"}),
    alpha="none",
    naming=ProcessorNaming((Prefix("", "unet", "unet", flat=False),), DIFFUSERS),
    marks=(r"^(down_blocks|mid_block|up_blocks)\..*\.processor\.to_(q|k|v|out)_lora\.",),
    families=UNET_FAMILIES,
    read=read_named,
)
