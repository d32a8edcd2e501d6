"""The adapter layouts, one file each; every module here that has a `LAYOUT` is one."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.plugins import layouts_of

_ORDER = (
    "kohya",
    "kohya_sgm",
    "lycoris",
    "lycoris_wrapper",
    "kohya_oft",
    "diffusers",
    "diffusers_old",
    "attn_procs",
    "peft",
    "comfy",
    "flux_kohya",
    "flux_diffusers",
    "onetrainer",
    "xlabs",
    "sd3_kohya",
    "sd3_diffusers",
    "cloneofsimo",
    "cloneofsimo_list",
    "hcp",
    "control_lora",
    "bfl_control",
)
"""The order in which people see them; a module that is not named here comes last."""

LAYOUTS: tuple[AdapterLayout, ...] = layouts_of(__name__, __path__, _ORDER)
"""Every layout; see `sdformats.adapters.layout.detect_adapter`."""
