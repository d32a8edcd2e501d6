"""The adapter layouts, one file each; every module here that has a `LAYOUT` is one."""

import importlib
import pkgutil

from sdformats.adapters.layout import AdapterLayout

_ORDER = (
    *(
        "kohya",
        "kohya_sgm",
        "lycoris",
        "lycoris_wrapper",
        "kohya_oft",
        "diffusers",
        "diffusers_old",
        "attn_procs",
        "peft",
    ),
    *("comfy", "flux_kohya", "flux_diffusers", "onetrainer", "xlabs", "sd3_kohya", "sd3_diffusers", "cloneofsimo"),
    *("cloneofsimo_list", "hcp", "control_lora", "bfl_control"),
)
"""The order in which people see them; a module that is not named here comes last."""


def _found() -> tuple[AdapterLayout, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.LAYOUT for module in modules if hasattr(module, "LAYOUT"))


LAYOUTS = _found()
"""Every layout; see `sdformats.adapters.layout.detect_adapter`."""
